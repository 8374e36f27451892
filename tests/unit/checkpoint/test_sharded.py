"""Shards of a checkpoint: any number of ranks reads them, and what is missing, cut off or changed is named."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from states import difference
from torch import nn

from trainer.checkpoint import files, sharded, weights
from trainer.checkpoint.export import export
from trainer.checkpoint.files import DamagedCheckpoint, commit_part, newest_good, read, read_share
from trainer.checkpoint.weights import load_weights
from trainer.checkpoint.writer import Order, commit
from trainer.errors import JobError
from trainer.parallel.shards import Part, cut
from trainer.run.attempts import claim
from trainer.run.folder import RunFolder

WEIGHTS = {"a": torch.randn(7, 3), "b.c": torch.randn(2).double(), "d": torch.randn(5, 2, 2).bfloat16()}
STATE = {"objects": {"optimizer": {"state": {"state": {0: {"exp_avg": torch.randn(7, 3), "step": torch.tensor(4.0)}}}}},
         "position": {"step": 4}}  # fmt: skip


def own(value: Any, index: int, count: int) -> Any:
    """What a rank has of it."""
    if isinstance(value, dict):
        return {key: own(inner, index, count) for key, inner in value.items()}
    return cut(value, index, count) if isinstance(value, torch.Tensor) and value.dim() else value


def save(root: Path, step: int, index: int, count: int, is_alone: bool = False, **others: Any) -> Path | None:
    contents = own({"model": WEIGHTS, **STATE}, index, count)
    contents["model"] |= others
    return commit_part(root, step, step, (index, count), contents, {}, 0, None, lambda: is_alone)


def save_all(root: Path, step: int, count: int) -> Path:
    """As writers do that know nothing of each other."""
    others = [threading.Thread(target=save, args=(root, step, index, count)) for index in range(1, count)]
    for thread in others:
        thread.start()
    folder = save(root, step, 0, count)
    for thread in others:
        thread.join()
    assert folder is not None
    return folder


def test_any_number_of_ranks_reads_what_some_wrote(tmp_path: Path) -> None:
    """Each gets its rows, also where there are fewer rows than ranks; a single process gets whole tensors."""
    for written in (1, 2, 3, 4):
        folder = save_all(tmp_path / str(written), 4, written)
        assert difference(read(folder, lambda: None), [WEIGHTS, STATE]) == ""
        assert difference(load_weights(folder), WEIGHTS) == ""
        for count in (2, 3, 4):
            for index in range(count):
                found, state = read_share(folder, (index, count))
                parts = [*found.values(), state["objects"]["optimizer"]["state"]["state"][0]["exp_avg"]]
                wholes = [*WEIGHTS.values(), STATE["objects"]["optimizer"]["state"]["state"][0]["exp_avg"]]  # type: ignore[index]
                for part, whole in zip(parts, wholes, strict=True):
                    expected = cut(whole, index, count)
                    assert isinstance(part, Part) and torch.equal(part.rows, expected.rows)
                    assert (part.shape, part.start) == (expected.shape, expected.start)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_weights_are_exported(tmp_path: Path, count: int, name: str) -> None:
    """Of a sharded checkpoint (and of another: 0), as what others read; of the newest, or an older step."""
    run = RunFolder(tmp_path)
    others = {"net": {"weight": torch.ones(2, 2)}}
    if count:
        save_all(run.checkpoints, 4, count)
    else:
        files.commit(run.checkpoints, 4, {"model.pt": WEIGHTS, "state.pt": STATE}, {}, 0)
    files.commit(run.checkpoints, 8, {"model.pt": others, "state.pt": STATE}, {}, 0)
    assert export(run, tmp_path / name, 4).name == "step-000000004"
    found = load_file(tmp_path / name) if name.endswith("s") else torch.load(tmp_path / name, weights_only=True)
    assert difference(dict(sorted(found.items())), WEIGHTS) == ""
    assert export(run, tmp_path / f"new-{name}", None).name == "step-000000008"
    assert difference(load_weights(tmp_path / f"new-{name}"), nested(name)) == ""
    assert [path.name for path in tmp_path.glob(".*")] == []
    for target, step, problem in (("model.bin", None, "which format"), (name, 5, "There are: 4, 8")):
        with pytest.raises(JobError, match=problem):
            export(run, tmp_path / target, step)


@pytest.mark.parametrize("count", [0, 2])
def test_what_is_no_tensor_is_exported_or_refused(tmp_path: Path, count: int) -> None:
    """Such as a module's extra state: a safetensors file would lack it."""
    run, others = RunFolder(tmp_path), {"net._extra_state": {"scale": 3}, "odd": torch.ones(2).to_sparse()}
    if count:
        other = threading.Thread(target=save, args=(run.checkpoints, 4, 1, 2), kwargs=others)
        other.start()
        save(run.checkpoints, 4, 0, 2, **others)
        other.join()
    else:
        files.commit(run.checkpoints, 4, {"model.pt": {**WEIGHTS, **others}, "state.pt": STATE}, {}, 0)
    export(run, tmp_path / "model.pt", None)
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(found["a"], WEIGHTS["a"]) and found["net._extra_state"] == {"scale": 3}
    assert torch.equal(found["odd"].to_dense(), torch.ones(2))
    with pytest.raises(JobError, match=r"cannot hold net\._extra_state\.scale, which is a Python int"):
        export(run, tmp_path / "model.safetensors", None)


def test_a_rank_starts_with_its_parts_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint that one rank has verified, under the names of the model; another shape is told of before."""
    folder = save_all(tmp_path, 4, 2)
    model = nn.ParameterDict({name.replace(".", ""): torch.zeros_like(value) for name, value in WEIGHTS.items()})
    verified: list[Path] = []
    monkeypatch.setattr(weights, "verify", verified.append)
    taken: list[Any] = []

    def take(state: dict[str, Any]) -> dict[str, Any]:
        taken.append(state)
        return {name: torch.zeros(part.shape) for name, part in state.items()}

    model["d"] = torch.zeros(1)
    weights.start_from(model, folder, False, lambda said: None, lambda read: read(), take, (1, 3))
    assert verified == [folder]
    assert list(taken[-1]) == ["a"]
    assert torch.equal(taken[-1]["a"].rows, cut(WEIGHTS["a"], 1, 3).rows) and taken[-1]["a"].start == 3
    weights.start_from(model, folder, False, lambda said: None, lambda read: str(folder), take, (1, 3))
    assert verified == [folder]


def nested(name: str) -> dict[str, Any]:
    """Weights of several modules: safetensors have flat names, and a module alone is unpacked."""
    return {"net.weight": torch.ones(2, 2)} if name.endswith("s") else {"weight": torch.ones(2, 2)}


@pytest.mark.parametrize("damage, problem", [
    (lambda path: path.unlink(), "is missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "bits have changed"),
])  # fmt: skip
def test_a_damaged_shard_is_named_and_the_checkpoint_before_taken(tmp_path: Path, damage: Any, problem: str) -> None:
    before, newest = save_all(tmp_path, 4, 3), save_all(tmp_path, 8, 3)
    damage(newest / sharded.shard_name(2, 3))
    found, refused = newest_good(tmp_path)
    assert found == before
    assert "shard-00002-of-00003" in refused[newest] and problem in refused[newest]
    with pytest.raises(DamagedCheckpoint, match="shard-00002"):
        read(newest, lambda: None)


def test_shards_that_do_not_come_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When who ordered has gone, and nothing grows any more; what is being written meanwhile is waited for."""
    monkeypatch.setattr(sharded, "STILL_S", 0.3)
    started = time.monotonic()
    late = threading.Timer(0.15, save, (tmp_path, 4, 1, 3))
    late.start()
    with pytest.raises(OSError, match=r"shards \[2\] did not come"):
        save(tmp_path, 4, 0, 3, is_alone=True)
    assert time.monotonic() - started > 0.4
    late.join()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first one would wait for it for ever."""
    problems: list[OSError] = []

    def save_first() -> None:
        try:
            save(tmp_path, 4, 0, 2)
        except OSError as error:
            problems.append(error)

    first = threading.Thread(target=save_first)
    first.start()
    while not list(tmp_path.glob(".pending*/0.done")):
        time.sleep(0.001)
    monkeypatch.setattr(files, "write_shard", lambda parts, file: file.none)
    with pytest.raises(AttributeError):
        save(tmp_path, 4, 1, 2)
    first.join(5)
    assert "the writer of shard 1" in str(problems[0])
    assert list(tmp_path.iterdir()) == []


def test_who_commits_a_checkpoint_leaves_the_later_ones_to_their_writers(tmp_path: Path) -> None:
    """After a restart a rank may be done with its shard of the next, while rank 0's writer ends the one before."""
    run = RunFolder(tmp_path)
    for attempt in (0, 1):
        claim(run, attempt)

    def write(step: int, attempt: int, number: int, index: int) -> None:
        order = Order(str(tmp_path), step, attempt, {}, 3, None, shard=(index, 2), number=number, limit_s=5)
        commit(order, own({"model": WEIGHTS, **STATE}, index, 2), lambda: 1)

    def folders() -> list[str]:
        return sorted(path.name for path in run.checkpoints.iterdir())

    write(9, 0, 6, 1)  # the first writer gave that one up before
    write(10, 0, 7, 1)
    write(11, 1, 1000001, 1)
    write(10, 0, 7, 0)
    assert folders() == [".pending-step-000000011-1000001", "step-000000010"]
    files.sweep(run.checkpoints, 1000001)  # as a new writer does with its first order
    write(11, 1, 1000001, 0)
    assert folders() == ["step-000000010", "step-000000011"]
    assert difference(read(run.checkpoints / "step-000000011", lambda: None), [WEIGHTS, STATE]) == ""


def test_shards_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    contents = own({"model": WEIGHTS, **STATE}, 0, 2)
    with pytest.raises(OSError, match=r"shards \[1\] did not come: nothing was written for 0 s"):
        commit_part(tmp_path, 4, 4, (0, 2), contents, {}, 0, None, lambda: False, 0.2)
    assert list(tmp_path.iterdir()) == []


def test_a_commit_that_failed_leaves_nothing_of_those_before_it(tmp_path: Path) -> None:
    """While a disk is full at the end, each try is a commit of its own, for which a late writer makes a folder."""
    commit_part(tmp_path, 4, 7, (1, 2), own(WEIGHTS, 1, 2), {}, 0, None, lambda: False)  # the first gave up before
    commit_part(tmp_path, 4, 9, (1, 2), own(WEIGHTS, 1, 2), {}, 0, None, lambda: False)  # it tries again already
    with pytest.raises(OSError, match="did not come"):
        commit_part(tmp_path, 4, 8, (0, 2), own(WEIGHTS, 0, 2), {}, 0, None, lambda: False, 0.2)
    assert [path.name for path in tmp_path.iterdir()] == [".pending-step-000000004-9"]
