"""Loading: workers change nothing but speed; what is random about a sample depends on seed, epoch and index alone."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults import Fault
from ranks import complete, evaluations, losses, make_job, order_of_samples, train
from states import difference, read_state
from stopwatch import Stopwatch

AUGMENTED = {"own generator": "task=data_tasks:Shifted", "global generators": "task=data_tasks:GloballyShifted"}
DROPOUT = "task_args.dropout=0.3"


@pytest.mark.parametrize("task", [*AUGMENTED.values(), "task=digit_tasks:Small", "task=digit_tasks:Tied"])
@pytest.mark.parametrize("mode", ["parallel=single", "devices_per_node=2"])
def test_workers_change_nothing(tmp_path: Path, task: str, mode: str) -> None:
    keys = [task, mode] + ([] if task.endswith("Tied") else [DROPOUT])
    complete(tmp_path / "none", make_job(*keys))
    complete(tmp_path / "two", make_job(*keys, "data.workers=2", "data.prefetch=1"))
    assert difference(read_state(tmp_path / "none"), read_state(tmp_path / "two")) == ""
    assert losses(tmp_path / "none") == losses(tmp_path / "two")
    assert evaluations(tmp_path / "none") == evaluations(tmp_path / "two")
    assert order_of_samples(tmp_path / "none") == order_of_samples(tmp_path / "two")


@pytest.mark.parametrize("kind", AUGMENTED)
def test_augmentation_is_the_same_at_any_world_size(tmp_path: Path, kind: str) -> None:
    keys = [AUGMENTED[kind], "train.precision=float64"]
    complete(tmp_path / "1", make_job(*keys, "parallel=single"))
    for ranks in (2, 3):
        complete(tmp_path / f"{ranks}", make_job(*keys, f"devices_per_node={ranks}"))
        assert losses(tmp_path / f"{ranks}") == pytest.approx(losses(tmp_path / "1"), rel=1e-12)
    complete(tmp_path / "other seed", make_job(*keys, "parallel=single", "seed=1"))
    assert losses(tmp_path / "other seed") != pytest.approx(losses(tmp_path / "1"), rel=1e-3)


@pytest.mark.parametrize("kind", AUGMENTED)
def test_augmentation_differs_between_epochs_and_resumes(tmp_path: Path, kind: str) -> None:
    """In the middle of an epoch, at another world size, with workers."""
    keys = [AUGMENTED[kind], "train.precision=float64", "checkpoint.every_steps=2", "task_args.journal=true"]
    whole = complete(tmp_path / "whole", make_job(*keys, "parallel=single"))
    seen: dict[str, set[str]] = {}
    for line in whole.output().splitlines():
        if line.startswith("shift of"):
            sample, _, shift = line.partition(": ")
            seen.setdefault(sample, set()).add(shift)
    assert len(seen) == 101
    assert sum(len(shifts) > 1 for shifts in seen.values()) > 80
    train(tmp_path / "run", make_job(*keys, "devices_per_node=2"), Fault(7))
    complete(tmp_path / "run", make_job(*keys, "devices_per_node=3", "data.workers=1"))
    assert losses(tmp_path / "run") == pytest.approx(losses(whole.folder), rel=1e-12)


@pytest.mark.parametrize("mode", ["parallel=single", "devices_per_node=2"])
def test_kill_and_resume_with_workers(tmp_path: Path, mode: str, stopwatch: Stopwatch) -> None:
    """Workers run ahead of the training; what they had read is read again. They die with their rank."""
    job = make_job("task=data_tasks:GloballyShifted", DROPOUT, mode, "data.workers=2", "checkpoint.every_steps=4")
    complete(tmp_path / "uninterrupted", job)
    with stopwatch.at_most(30):
        run = train(tmp_path / "run", job, Fault(7, rank=job.world_size - 1))
    assert run.codes[-1] == -signal.SIGKILL and all(run.codes)
    complete(tmp_path / "run", job)
    assert difference(read_state(tmp_path / "uninterrupted"), read_state(tmp_path / "run")) == ""


def test_an_error_in_a_worker_ends_the_rank(tmp_path: Path) -> None:
    run = train(tmp_path, make_job("task=data_tasks:Unreadable", "devices_per_node=2", "data.workers=1"))
    assert run.code == 1
    assert any("image 40 cannot be read" in run.output(rank) for rank in (0, 1))


@pytest.mark.parametrize("mode", ["parallel=single", "devices_per_node=2", "parallel=dp devices_per_node=2"])
def test_a_loss_that_is_not_one_per_sample_is_refused(tmp_path: Path, mode: str) -> None:
    """Its mean would silently be over something else."""
    for shape, problem in (
        ("mean", "shape (batch,)"),
        ("twice", "must have one value for each of the"),
        ("classes", "shape (batch,)"),
    ):
        run = train(tmp_path / shape, make_job("task=data_tasks:Misshapen", f"task_args.shape={shape}", *mode.split()))
        assert run.code == 64
        assert "JobError: task.loss=" in run.output(0) and problem in run.output(0)
    run = train(tmp_path / "metric", make_job("task=data_tasks:Misshapen", "task_args.shape=metric", *mode.split()))
    assert run.code == 64
    assert "JobError: task.metrics={'share': ()}: must have a value for each of the" in run.output(0)
