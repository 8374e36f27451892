"""The options of DistributedDataParallel: each does what it says, and the training stays the same where it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults import Fault
from ranks import complete, evaluations, losses, make_job, train
from states import difference, read_state

DDP = ["devices_per_node=2", "train.precision=float64"]
LINEAR = "task=digit_tasks:Branched"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Default options."""
    return complete(tmp_path_factory.mktemp("plain"), make_job(*DDP)).folder


def reductions(folder: Path, *keys: str) -> int:
    """The number of all-reduces in two ordinary steps, by the profiler."""
    complete(folder, make_job("devices_per_node=2", "log.profile_steps=[3,4]", *keys))
    trace = json.loads((folder / "profile/rank0.json").read_text())["traceEvents"]
    return len([event for event in trace if event.get("name") == "gloo:all_reduce"])


def test_small_buckets_are_reduced_one_by_one(tmp_path: Path, plain: Path) -> None:
    complete(tmp_path / "small", make_job(*DDP, "ddp.bucket_mb=0.0001"))
    assert losses(tmp_path / "small") == pytest.approx(losses(plain), rel=1e-12)
    assert reductions(tmp_path / "large") == 2  # which also says that the agreement on loss and stop costs none
    assert reductions(tmp_path / "small traced", "ddp.bucket_mb=0.0001") > 4


def test_accumulation_reduces_once_a_step(tmp_path: Path) -> None:
    assert reductions(tmp_path, "train.accumulate=3") == 2


def test_static_graph(tmp_path: Path, plain: Path) -> None:
    complete(tmp_path, make_job(*DDP, "ddp.static_graph=true"))
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=1e-12)


@pytest.mark.parametrize("keys", [[], ["train.accumulate=3"]])
def test_parameters_that_were_never_used_are_named(tmp_path: Path, keys: list[str]) -> None:
    run = train(tmp_path, make_job(*DDP, LINEAR, *keys))
    assert run.code == 64
    assert "ddp.find_unused_parameters=False: the loss does not use second.weight, second.bias." in run.output(0)


def test_parameters_that_are_not_used_any_more_are_named(tmp_path: Path) -> None:
    """The first attempt's first step used them."""
    run = train(tmp_path, make_job(*DDP, LINEAR, "task_args={first: 1, last: 4}"))
    assert run.code == 64
    assert "the loss does not use second.weight, second.bias" in run.output(0)


def test_parameters_that_only_an_earlier_micro_batch_used_stop_the_run_before_the_update(tmp_path: Path) -> None:
    """DDP averages no gradient of theirs, so the ranks would differ from there on."""
    keys = [LINEAR, "task_args={first: 1, last: 2}", "train.accumulate=3", "checkpoint.every_steps=1"]
    run = train(tmp_path, make_job(*DDP, *keys))
    assert run.code == 64
    assert "the loss does not use parameters in the last micro-batch that an earlier one used" in run.output(0)
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_unused_parameters_are_found_when_asked_for(tmp_path: Path) -> None:
    for arguments in ("{}", "{first: 1, last: 4}", "{first: 5, last: 9}"):
        for mode in ("parallel=single", "ddp.find_unused_parameters=true"):
            ddp = ["devices_per_node=2"] if mode.startswith("ddp") else []
            complete(
                tmp_path / arguments / mode,
                make_job("train.precision=float64", LINEAR, mode, *ddp, f"task_args={arguments}"),
            )
        expected = losses(tmp_path / arguments / "parallel=single")
        assert losses(tmp_path / arguments / mode) == pytest.approx(expected, rel=1e-12), arguments


LEARNS = ["devices_per_node=2", "train.steps=60", "task_args.held_out=200"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without compression, for long enough to learn something."""
    return complete(tmp_path_factory.mktemp("learned"), make_job(*LEARNS)).folder


@pytest.mark.parametrize("kind, tolerance", [("bf16", 0.02), ("fp16", 0.005), ("powersgd", 0.3)])
def test_compressed_gradients_train_nearly_the_same(tmp_path: Path, learned: Path, kind: str, tolerance: float) -> None:
    complete(tmp_path, make_job(*LEARNS, f"ddp.compression={kind}"))
    expected, found = losses(learned), losses(tmp_path)
    assert found[0] == pytest.approx(expected[0], rel=1e-6), "the reported loss was compressed with the gradients"
    assert found != expected
    assert found[-1] < 0.3 * found[0]
    final = [evaluations(run)[-1]["loss"] for run in (learned, tmp_path)]
    assert final[1] == pytest.approx(final[0], rel=tolerance)


def test_powersgd_with_several_buckets(tmp_path: Path) -> None:
    """It starts more collectives when the first of a bucket is done: in any order, gloo would pair the wrong ones."""
    complete(
        tmp_path, make_job("devices_per_node=2", "ddp.compression=powersgd", "ddp.bucket_mb=0.001", "train.steps=40")
    )
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0]


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_large_loss_survives_compression(tmp_path: Path, kind: str) -> None:
    """Float16 ends at 65,504; the loss does not."""
    complete(tmp_path, make_job("devices_per_node=2", f"ddp.compression={kind}", "task=digit_tasks:Large"))
    assert losses(tmp_path) == pytest.approx([1e6] * 21, rel=1e-5)


LOCAL = [
    "devices_per_node=2",
    "ddp.sync_every=4",
    "ddp.sync_start=2",
    "train.optimizer=sgd",
    "train.optimizer_args={momentum: 0.9}",
    "train.lr=0.05",
    "task_args.batchnorm=true",
    "task_args.dropout=0.2",
    "checkpoint.every_steps=3",
]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Post-local SGD to the end."""
    return complete(tmp_path_factory.mktemp("local"), make_job(*LOCAL)).folder


@pytest.mark.parametrize("killed_after", [1, 4, 8, 12, 17])
def test_post_local_sgd_makes_ranks_equal_at_checkpoints(tmp_path: Path, local: Path, killed_after: int) -> None:
    """After a resume all ranks have rank 0's weights and momenta: if they had differed, the result would."""
    train(tmp_path, make_job(*LOCAL), Fault(killed_after, rank=1))
    complete(tmp_path, make_job(*LOCAL))
    assert difference(read_state(local), read_state(tmp_path)) == ""


def test_post_local_sgd_communicates_less_and_learns(tmp_path: Path, local: Path) -> None:
    assert losses(local)[-1] < 0.6 * losses(local)[0]
    keys = ["ddp.sync_every=2", "checkpoint.every_steps=null"]
    assert reductions(tmp_path, *keys) == 3  # one average: of weights, of optimizer state, of the vote


def test_post_local_sgd_begins_as_ddp(tmp_path: Path) -> None:
    plain = [key for key in LOCAL if "sync" not in key]
    complete(tmp_path / "plain", make_job(*plain))
    complete(tmp_path / "late", make_job(*plain, "ddp.sync_every=4", "ddp.sync_start=100"))
    assert difference(read_state(tmp_path / "plain"), read_state(tmp_path / "late")) == ""


def test_sync_batchnorm_needs_gpus(tmp_path: Path) -> None:
    run = train(tmp_path, make_job("devices_per_node=2", "device=auto", "ddp.sync_batchnorm=true"))
    if run.codes == [0, 0]:
        pytest.skip("this machine has GPUs enough")
    assert run.code == 64
    assert "ddp.sync_batchnorm=True: torch implements it for GPUs only" in run.output(0)
