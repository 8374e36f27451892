"""A checkpoint whose bytes changed is refused by name and the one before is used, loudly; silence is no option."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import Fault, fill_disk, supersede
from ranks import complete, events, make_job, train
from states import difference, read_state, steps_saved

from trainer.records import read_lines

KEYS = ["checkpoint.every_steps=3", "checkpoint.keep_last=3", "train.optimizer=sgd", "task_args.dropout=0.2"]


def truncate(file: Path) -> None:
    """Cut the end off, as a crash of a file server does."""
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    """Change one bit in the middle: torch.load would not notice."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 18, 20 and 21."""
    run = complete(tmp_path_factory.mktemp("trained"), make_job("devices_per_node=2", *KEYS))
    assert steps_saved(run.folder) == [18, 20, 21]
    return run.folder


@pytest.mark.parametrize("damage, file, problem", [
    (truncate, "model.pt", "bytes instead of"),
    (flip, "model.pt", "sha256 is not the manifest's"),
    (flip, "state.pt", "sha256 is not the manifest's"),
    (Path.unlink, "state.pt", "is missing"),
    (truncate, "manifest.json", "manifest.json is missing or unreadable"),
    (Path.unlink, "manifest.json", "manifest.json is missing or unreadable"),
])  # fmt: skip
def test_the_newest_is_refused_by_name_and_the_previous_used(
    tmp_path: Path, trained: Path, damage: Callable[[Path], None], file: str, problem: str
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    damage(tmp_path / "checkpoints/step-000000021" / file)
    run = complete(tmp_path, make_job("devices_per_node=2", *KEYS))
    assert [event["step"] for event in events(tmp_path, "resume")] == [20]
    assert "WARNING: checkpoint refused: " in run.output(0)
    (refused,) = events(tmp_path, "checkpoint_refused")
    assert "step-000000021" in refused["problem"] and problem in refused["problem"]
    assert difference(read_state(trained), read_state(tmp_path)) == ""
    assert steps_saved(tmp_path) == [18, 20, 21], "the damaged one took the place of a good one"


def test_two_damaged_ones_cost_no_good_one_its_place(tmp_path: Path, trained: Path) -> None:
    """With one checkpoint kept, the first that is made after the resume must not be pruned as an old one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for step in (20, 21):
        flip(tmp_path / f"checkpoints/step-{step:09d}/model.pt")
    job = make_job("devices_per_node=2", *KEYS, "checkpoint.keep_last=1", "checkpoint.every_steps=1")
    train(tmp_path, job, Fault(2, "before update"))
    assert steps_saved(tmp_path) == [19]
    complete(tmp_path, make_job("devices_per_node=2", *KEYS))
    assert difference(read_state(trained), read_state(tmp_path)) == ""
    kept = sorted(path.name for path in tmp_path.glob("checkpoints/damaged-*"))
    assert [name[:22] for name in kept] == ["damaged-step-000000020", "damaged-step-000000021"]


def test_all_damaged_is_an_error_and_nothing_is_touched(tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for step in (18, 20, 21):
        flip(tmp_path / f"checkpoints/step-{step:09d}/model.pt")
    run = train(tmp_path, make_job("devices_per_node=2", *KEYS))
    assert run.code == 1
    for rank in (0, 1):
        assert "every checkpoint is damaged" in run.output(rank)
        assert all(f"step-{step:09d}/model.pt" in run.output(rank) for step in (18, 20, 21))
    assert steps_saved(tmp_path) == [18, 20, 21]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_stale_attempt_neither_starts_nor_saves(tmp_path: Path, asynchronous: str) -> None:
    """A node that was declared dead may live on: what it does must not reach the run."""
    job = make_job("parallel=single", "checkpoint.every_steps=1", f"checkpoint.asynchronous={asynchronous}")
    run = train(tmp_path, job, Fault(8, event=supersede))
    assert run.code == 1
    assert "attempt 0 of" in run.output() and "replaced by attempt 1" in run.output()
    written = {name: read_lines(tmp_path / name)[-1]["step"] for name in ("metrics.jsonl", "samples-rank0.jsonl")}
    assert written == {"metrics.jsonl": 7, "samples-rank0.jsonl": 7}, "metrics after a step, samples before it"
    saved = steps_saved(tmp_path)
    assert saved == [6, 7] or (asynchronous == "true" and saved in ([5, 6], [4, 5]))  # two were still being written
    again = train(tmp_path, job, attempt=0)
    assert again.code == 1 and steps_saved(tmp_path) == saved
    assert complete(tmp_path, job).attempt == 2


@pytest.mark.parametrize("keys", [
    ["parallel=single"], ["devices_per_node=2"], ["devices_per_node=2", "checkpoint.asynchronous=true"],
])  # fmt: skip
def test_a_full_disk_ends_the_attempt_and_costs_nothing_else(
    tmp_path: Path, keys: list[str], small_disk: Callable[[str], Path]
) -> None:
    """All ranks end, the reason is said, and with space again the run goes on from the last checkpoint."""
    folder = small_disk("2m")
    job = make_job(
        *keys, "checkpoint.every_steps=1", "checkpoint.keep_last=99"
    )  # none is removed, which would make room
    run = train(folder, job, Fault(10, event=fill_disk))
    assert run.code == 1
    assert "No space left on device" in run.output(0)
    saved = steps_saved(folder)
    last = 9 if "checkpoint.asynchronous=true" not in keys else saved[-1]
    assert saved == list(range(1, last + 1)) and last in (7, 8, 9), "those after it were still being written"
    (folder / "ballast").unlink()
    complete(folder, job)
    complete(tmp_path / "uninterrupted", make_job(*keys))
    assert difference(read_state(tmp_path / "uninterrupted"), read_state(folder)) == ""
