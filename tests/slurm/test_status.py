"""What `muster` says of jobs and does with them, as they wait, run, come back and end, with and without accounting."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from slurm_cluster import Cluster
from slurm_runs import MUSTER, Run, muster, same_weights, submit

ENDS = {
    "done": ("done", ""),
    "failed": ("failed", "bad luck"),
    "wrong": ("failed", "nesterov"),
    "cancelled": ("cancelled", "cancelled"),
    "timed out": ("failed", "its time limit ended it"),
    "node failed": ("failed", "a node failed and Slurm did not requeue it"),
}
CODES = {"done": 0, "failed": 1, "wrong": 64}
BY_ITS_FOLDER = {
    "timed out": ("stopped", "stopped on request with a checkpoint saved"),  # within Slurm's KillWait
    "cancelled": ("cancelled", "stopped on request with a checkpoint saved"),
    "node failed": ("lost", "Slurm does not know the job any more, and the run folder holds no end"),
}
ONE = ("nodes=1", "devices_per_node=1")


@dataclass(frozen=True)
class Life:
    """One job that waited, ran, was preempted by `muster preempt` and ended, with what was said of it on the way."""

    run: Run
    said: dict[str, list[dict[str, Any]]]
    """At each moment, with accounting and without."""
    followed: str
    """All that `muster logs -f` printed."""


@pytest.fixture(scope="module")
def life(slurm_session: Cluster) -> Iterator[Life]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", slurm_session.path)
        said = {}

        def ask(run: Run) -> list[dict[str, Any]]:
            with slurm_session.no_accounting():
                without = run.status()
            return [run.status(), without]

        blocker = slurm_session.sbatch("--nodes=4", "--exclusive", "--wrap", "sleep 60", "--output=/dev/null")
        slurm_session.wait(blocker, "RUNNING")
        folder = slurm_session.session / "life"
        run = submit(folder, f"task_args.until={folder}/go on", "checkpoint.every_steps=1000")
        said["waits"] = ask(run)
        slurm_session.run("scancel", blocker)
        run.wait_step(5)
        said["runs"] = ask(run)
        with subprocess.Popen([MUSTER, "logs", "-f", run.folder], stdout=subprocess.PIPE, text=True) as follower:
            muster("preempt", run.folder)
            run.until("a requeue", lambda: run.state().phase == "pending")
            slurm_session.run("scontrol", "update", f"JobId={run.job_id}", "StartTime=now+600")  # Slurm's own hold: 6 s
            run.until("its next look at the job", lambda: "BeginTime" in run.state().reason)
            said["requeued"] = ask(run)
            (folder / "go on").touch()
            slurm_session.run("scontrol", "update", f"JobId={run.job_id}", "StartTime=now")
            run.wait_end()
            followed, _ = follower.communicate(timeout=30)
        said["done"] = ask(run)
        yield Life(run, said, followed)


@pytest.mark.parametrize(
    "moment, state, reason",
    [
        (
            "waits",
            "pending",
            r"Slurm says: Resources \(too few nodes are free: .*\)(, expected at \d\d-\d\d \d\d:\d\d)?",
        ),
        ("runs", "running", ""),
        ("requeued", "pending", r"requeued \(DUE TO JOB REQUEUE\), Slurm says: BeginTime \(.*\), expected at .*"),
        ("done", "done", ""),
    ],
)
def test_status(life: Life, moment: str, state: str, reason: str) -> None:
    with_accounting, without = life.said[moment]
    assert with_accounting["state"] == state
    assert re.fullmatch(reason, with_accounting["reason"]) and re.fullmatch(reason, without["reason"])
    # The training goes on between the two, and Slurm's estimate may change.
    changing = dict.fromkeys(("step", "reason", "elapsed_s", "left_s", "train"))
    assert without | changing == with_accounting | changing


def test_a_preemption_with_notice_loses_no_step(life: Life) -> None:
    """The checkpoint is of the very step at which the ranks agreed, not of a cadence."""
    (stopped,), (resumed,) = life.run.events("stopped"), life.run.events("resume")
    assert resumed["step"] == stopped["step"] >= 5


def test_it_ends_with_the_same_bits(life: Life, reference: Run) -> None:
    assert same_weights(life.run, reference)


def test_following_the_logs_goes_on_over_a_requeue(life: Life) -> None:
    assert life.followed.count("STOPPED (exit 75)") == 2
    assert len(life.followed) == len(muster("logs", life.run.folder).stdout)


@pytest.fixture(scope="module")
def ended(slurm_session: Cluster) -> Iterator[dict[str, Run]]:
    """Runs that ended, all at the same time, each in its own way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", slurm_session.path)
        folder = slurm_session.session / "ended"
        folder.mkdir()
        (folder / "site.yaml").write_text("sbatch_args: [--no-requeue, --nodelist=n4]\n")
        slow = (*ONE, "task_args.step_s=1")
        runs = {
            "done": submit(folder, *ONE, "train.steps=5", "task_args.step_s=0"),
            "failed": submit(
                folder,
                *ONE,
                "agent.restarts=0",
                "task_args={what: raise, at: 2, rank: 0}",
                f"task_args.once={folder}/x",
            ),
            "wrong": submit(folder, *ONE, "train.optimizer_args={nesterov: 1}"),
            "cancelled": submit(folder, *slow),
            "timed out": submit(folder, *slow),
            "node failed": submit(folder, *slow, "--site", folder / "site.yaml"),
        }
        for name in ("cancelled", "timed out", "node failed"):
            runs[name].wait_step(2)
        muster("cancel", runs["cancelled"].folder)
        slurm_session.run("scontrol", "update", f"JobId={runs['timed out'].job_id}", "EndTime=now+1")
        slurm_session.power_off("n4")
        for run in runs.values():
            run.wait_end()
        yield runs
        slurm_session.reset()


@pytest.mark.parametrize("who", ["all of Slurm", "no accounting", "accounting alone", "the run folder alone"])
@pytest.mark.parametrize("end", ENDS)
def test_how_it_ended(ended: dict[str, Run], slurm: Cluster, end: str, who: str) -> None:
    with ExitStack() as stack:
        if who in ("no accounting", "the run folder alone"):
            stack.enter_context(slurm.no_accounting())
        if who in ("accounting alone", "the run folder alone"):
            stack.enter_context(slurm.forgotten())
        status = ended[end].status()
    state, reason = BY_ITS_FOLDER.get(end, ENDS[end]) if who == "the run folder alone" else ENDS[end]
    assert (status["state"], reason in status["reason"]) == (state, True), status
    assert end not in CODES or status["code"] == CODES[end]


def test_a_wrong_job_is_not_tried_again(ended: dict[str, Run]) -> None:
    assert len(ended["wrong"].events("attempt")) == 1


def test_a_cancelled_job_has_saved_and_does_not_come_back(ended: dict[str, Run], slurm: Cluster) -> None:
    assert ended["cancelled"].events("stopped")
    assert slurm.job(ended["cancelled"].job_id)["Restarts"] == "0"


def test_list_shows_them_all(ended: dict[str, Run], slurm: Cluster) -> None:
    listed = muster("list", ended["done"].folder.parent).stdout.splitlines()
    said = {line.split()[-1]: line.split()[0] for line in listed}
    assert said == {str(run.folder): ENDS[end][0] for end, run in ended.items()}
