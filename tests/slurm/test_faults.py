"""Faults of ranks, nodes, the network and Slurm's own making: what must happen, and the same weights in the end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import Run, muster, same_weights, submit, uninterrupted


@pytest.fixture(scope="module")
def reference(slurm_session: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The run that nothing interrupted."""
    yield uninterrupted(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("what, kind", [("raise", "user code"), ("kill", "killed"), ("stop", "hung")])
def test_a_rank_fails(slurm: Cluster, shared_path: Path, reference: Run, what: str, kind: str) -> None:
    """It raises, is killed, or hangs: all start again in the same allocation."""
    run = submit(shared_path, f"task_args.what={what}", "task_args.rank=3", f"task_args.once={shared_path}/once")
    assert run.wait_end()["state"] == "done", run.describe()
    (failure,) = run.events("failure")
    assert (failure["kind"], failure["rank"], failure["node"], failure["host"]) == (kind, 3, 1, "n2"), failure
    assert slurm.job(run.job_id)["Restarts"] == "0"
    assert same_weights(run, reference)


def power_off(slurm: Cluster, run: Run) -> None:
    slurm.power_off("n2")


def cut(slurm: Cluster, run: Run) -> None:
    slurm.cut("n2")
    run.until("a requeue", lambda: slurm.job(run.job_id)["Restarts"] == "1")
    slurm.heal("n2")  # with ranks of the first attempt alive on it, if they did not end themselves


def kill_slurmd(slurm: Cluster, run: Run) -> None:
    slurm.kill_slurmd("n2")


def requeue(slurm: Cluster, run: Run) -> None:
    slurm.run("scontrol", "requeue", run.job_id)


def set_down(slurm: Cluster, run: Run) -> None:
    slurm.set_down("n2")


def preempt(slurm: Cluster, run: Run) -> None:
    high = slurm.sbatch("--partition=high", "--nodes=4", "--exclusive", "--wrap", "sleep 1", "--output=/dev/null")
    slurm.wait(high)


def rehearse(slurm: Cluster, run: Run) -> None:
    muster("preempt", run.folder)


def time_limit(slurm: Cluster, run: Run) -> None:
    slurm.run("scontrol", "update", f"JobId={run.job_id}", "EndTime=now+40seconds")
    run.until("a requeue", lambda: slurm.job(run.job_id)["Restarts"] == "1")
    slurm.run("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=30")  # that end had become its limit


@pytest.mark.parametrize(
    "fault", [power_off, cut, kill_slurmd, requeue, set_down, preempt, rehearse, time_limit], ids=lambda f: f.__name__
)
def test_the_job_comes_back_and_ends_with_the_same_bits(
    slurm: Cluster, shared_path: Path, reference: Run, fault: Callable[[Cluster, Run], None]
) -> None:
    # Slurm looks at time limits every 30 s only.
    run = submit(shared_path, f"task_args.step_s={0.5 if fault is time_limit else 0.05}")
    run.wait_step(15)
    fault(slurm, run)
    status = run.wait_end(180)
    assert status["state"] == "done", run.describe()
    assert int(slurm.job(run.job_id)["Restarts"]) >= 1 or fault in (kill_slurmd,)
    assert same_weights(run, reference), run.describe()


def test_a_stop_in_time_loses_no_step(slurm: Cluster, shared_path: Path) -> None:
    """A preemption with notice: the checkpoint is of the very step at which the ranks agreed, not of a cadence."""
    run = submit(shared_path, "checkpoint.every_steps=1000")
    run.wait_step(15)
    muster("preempt", run.folder)
    assert run.wait_end()["state"] == "done", run.describe()
    (stopped,) = run.events("stopped")
    (resumed,) = run.events("resume")
    assert resumed["step"] == stopped["step"] >= 15


def test_scancel_ends_it_for_good_with_a_checkpoint(slurm: Cluster, shared_path: Path) -> None:
    run = submit(shared_path)
    run.wait_step(15)
    muster("cancel", run.folder)
    assert run.wait_end()["state"] == "cancelled"
    assert run.events("stopped"), run.describe()
    slurm.until("no requeue", lambda: slurm.job(run.job_id)["JobState"] == "CANCELLED")


def test_a_wrong_task_is_not_tried_again(slurm: Cluster, shared_path: Path) -> None:
    run = submit(shared_path, "train.optimizer_args={nesterov: 1}")
    status = run.wait_end()
    assert (status["state"], status["code"]) == ("failed", 64), run.describe()
    assert "nesterov" in status["reason"]
    assert len(run.events("attempt")) == 1


def test_without_accounting_the_state_is_the_same(slurm: Cluster, shared_path: Path) -> None:
    blocker = slurm.sbatch("--nodes=4", "--exclusive", "--wrap", "sleep 4", "--output=/dev/null")
    slurm.wait(blocker, "RUNNING")
    with slurm.no_accounting():
        run = submit(shared_path, "train.steps=10", "task_args.step_s=0")
        pending = run.status()
        assert pending["state"] == "pending"
        assert "Resources" in pending["reason"] or "Priority" in pending["reason"]
        assert run.wait_end()["state"] == "done", run.describe()
