"""Random faults on one Slurm job, one after the other: in the end the weights of a calm run. Only in `make test-full`.

MUSTER_SEED chooses their order, and whom they strike; it is printed, and so are they.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from muster_runs import FULL
from slurm_cluster import Cluster
from slurm_runs import Run, muster, same_weights, submit, uninterrupted

SEED = int(os.environ.get("MUSTER_SEED") or random.randrange(1, 10**6))
STEPS = "train.steps=3000"
Strike = Callable[[Cluster, Run, str], None]


def signal_rank(name: str) -> Strike:
    """A signal to one of a host's ranks."""
    return lambda slurm, run, host: void(slurm.on_host(host, "pkill", f"-{name}", "--oldest", "muster-rank"))


def void(_: object) -> None:
    """Nothing."""


def kill_agent(slurm: Cluster, run: Run, host: str) -> None:
    """It ends the job, as srun is told; somebody submits the run again."""
    slurm.on_host(host, "pkill", "-KILL", "--full", r"muster(\.py)? agent")
    status = run.wait_end()
    assert status["state"] == "failed", status
    muster("submit", run.folder)


def cut_and_heal(slurm: Cluster, run: Run, host: str) -> None:
    slurm.cut(host)
    wait_for_requeue(slurm, run)
    slurm.heal(host)


def power_off_and_boot(slurm: Cluster, run: Run, host: str) -> None:
    slurm.power_off(host)
    wait_for_requeue(slurm, run)
    slurm.boot(host)


def kill_slurmd(slurm: Cluster, run: Run, host: str) -> None:
    slurm.kill_slurmd(host)
    wait_for_requeue(slurm, run)
    slurm.start_slurmd(host)


def requeue(slurm: Cluster, run: Run, host: str) -> None:
    slurm.run("scontrol", "requeue", run.job_id)


def preempt(slurm: Cluster, run: Run, host: str) -> None:
    muster("preempt", run.folder)


def wait_for_requeue(slurm: Cluster, run: Run) -> None:
    slurm.until("a requeue", lambda: run.state().phase == "pending", 90)


FAULTS: dict[str, Strike] = {
    "kill a rank": signal_rank("KILL"), "crash a rank": signal_rank("SEGV"), "stop a rank": signal_rank("STOP"),
    "kill an agent": kill_agent, "cut a host off": cut_and_heal, "power off": power_off_and_boot,
    "kill slurmd": kill_slurmd, "requeue": requeue, "preempt": preempt,
}  # fmt: skip
KINDS = {"kill a rank": "killed", "crash a rank": "crashed", "stop a rank": "hung"}

if FULL:

    @pytest.mark.timeout(3600)
    def test_any_fault_at_any_moment(slurm: Cluster, shared_path: Path) -> None:
        chance, go_on = random.Random(SEED), shared_path / "go on"
        print(f"\nMUSTER_SEED={SEED}", flush=True)
        run = submit(shared_path, STEPS, f"task_args.until={go_on}", "agent.restarts=9")
        run.wait_step(3)
        for number, name in enumerate(chance.sample(list(FAULTS), len(FAULTS)) + chance.choices(list(FAULTS), k=3)):
            hosts = slurm.run("scontrol", "show", "hostnames", slurm.job(run.job_id)["NodeList"]).stdout.split()
            before, failures = len(run.events("first_step")), len(run.events("failure"))
            host = chance.choice(hosts)
            print(f"{number + 1}. {name} on {host} after step {run.step()}", flush=True)
            FAULTS[name](slurm, run, host)
            run.until("the next attempt", lambda count=before: len(run.events("first_step")) > count, 180)  # type: ignore[misc]
            said = [failure["kind"] for failure in run.events("failure")[failures:]]
            assert name not in KINDS or said == [KINDS[name]], (name, said)
            step = run.step()
            run.until("progress", lambda since=step: run.step() > since + 2)  # type: ignore[misc]
        go_on.touch()
        assert run.wait_end(300)["state"] == "done", run.describe()
        assert same_weights(run, uninterrupted(shared_path / "calm", STEPS)), run.describe()
