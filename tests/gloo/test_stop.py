"""A stop request to any one rank, at any time: all ranks save once, exit 75, and the resumed run is the same."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults import Fault
from ranks import complete, evaluations, events, free_port, losses, make_job, order_of_samples, start, train, wait
from states import difference, read_state, steps_saved
from stop_rounds import run_rounds
from stopwatch import Stopwatch

STOPPED = 75
MODEL = ["task_args.dropout=0.3", "train.optimizer=sgd", "train.optimizer_args={momentum: 0.9}"]
MODES = {
    "single": ["parallel=single"],
    "dp": ["parallel=dp", "devices_per_node=2", "task_args.dropout=0"],
    "ddp": ["devices_per_node=2"],
    "ddp, accumulate": ["devices_per_node=2", "train.accumulate=3"],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run to the end of each mode."""
    root = tmp_path_factory.mktemp("uninterrupted")
    return {mode: complete(root / mode, make_job(*MODEL, *keys)).folder for mode, keys in MODES.items()}


def assert_same(run: Path, expected: Path) -> None:
    """All that the two runs leave behind is equal."""
    assert difference(read_state(expected), read_state(run)) == ""
    assert losses(run) == losses(expected)
    assert evaluations(run)[-1] == evaluations(expected)[-1]
    assert order_of_samples(run) == order_of_samples(expected)


@pytest.mark.parametrize("mode, number, count, moment, saved", [
    ("single", signal.SIGTERM, 7, "after update", 7),
    ("single", signal.SIGUSR2, 6, "in evaluation", 10),  # five batches each: the first of the second evaluation
    ("dp", signal.SIGINT, 7, "before update", 7),
    ("ddp", signal.SIGTERM, 7, "after update", 7),
    ("ddp", signal.SIGUSR2, 1, "before update", 1),
    ("ddp", signal.SIGINT, 5, "after update", 5),  # an evaluation is due there
    ("ddp", signal.SIGTERM, 3, "in evaluation", 10),
    ("ddp, accumulate", signal.SIGTERM, 12, "after update", 12),
])  # fmt: skip
def test_stop_and_resume(
    tmp_path: Path, uninterrupted: dict[str, Path], mode: str, number: int, count: int, moment: str, saved: int
) -> None:
    """At the end of the step, or of the evaluation batch; one step later where another rank was past it already."""
    job = make_job(*MODEL, *MODES[mode])
    run = train(tmp_path, job, Fault(count, moment, number, rank=job.world_size - 1))
    assert run.code == STOPPED
    step = steps_saved(tmp_path)[-1]
    assert step == saved or (step == saved + 1 and job.world_size > 1)
    assert [event["step"] for event in events(tmp_path, "stopped")] == [step]
    complete(tmp_path, job)
    assert_same(tmp_path, uninterrupted[mode])


@pytest.mark.parametrize("moment, count", [("after update", 20), ("after update", 21), ("in evaluation", 21)])
def test_stop_at_the_very_end(tmp_path: Path, uninterrupted: dict[str, Path], moment: str, count: int) -> None:
    """The last step, or the last evaluation, may still end the run; a resume gives its result in any case."""
    job = make_job(*MODEL, *MODES["single"])
    assert train(tmp_path, job, Fault(count, moment, signal.SIGTERM)).code in (0, STOPPED)
    complete(tmp_path, job)
    assert_same(tmp_path, uninterrupted["single"])
    assert len(events(tmp_path, "done")) >= 1


def test_every_attempt_is_stopped_and_the_run_still_ends(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    """Each attempt gets as far as one step and one evaluation batch."""
    job = make_job(*MODEL, *MODES["ddp"])
    codes = [train(tmp_path, job, Fault(1, "after update", signal.SIGTERM, rank=turn % 2)).code for turn in range(8)]
    assert codes == [STOPPED] * 8
    complete(tmp_path, job)
    assert_same(tmp_path, uninterrupted["ddp"])


def test_loader_workers_leave_the_signal_to_the_rank(tmp_path: Path, stopwatch: Stopwatch) -> None:
    """Slurm and Ctrl-C signal every process of the group; workers must neither die early nor outlive the rank.

    The rank answers although the task took the signals, as some libraries do.
    """
    job = make_job(*MODES["ddp"], "data.workers=2", "task=digit_tasks:Deaf")
    complete(tmp_path / "uninterrupted", job)
    with stopwatch.at_most(15):
        run = train(tmp_path / "run", job, Fault(7, number=signal.SIGTERM, group=True))
    assert run.code == STOPPED
    complete(tmp_path / "run", job)
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_stop_at_one_boundary_whoever_is_asked(world_size: int) -> None:
    """One rank, several or all, at once or one after the other, also while they wait for one inside a collective."""
    port = free_port()
    ranks = [start(run_rounds, rank, world_size, port, 200 // world_size) for rank in range(world_size)]
    assert wait(ranks, 60) == [0] * world_size
