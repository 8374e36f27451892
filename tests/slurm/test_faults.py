"""Faults of ranks, nodes, the network and Slurm's own making: what must happen, and the same weights in the end.

Each hits a training of two nodes with two ranks each. Most of their time is Slurm's own waiting, so three trainings at
a time wait together, on hosts of their own.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from muster_runs import FULL
from slurm_cluster import Cluster
from slurm_config import Layout
from slurm_runs import ROOT, Run, same_weights, submit

AT_A_TIME = 3
LAYOUT = Layout(hosts=12)  # two for each of those, and some that do not come back


@dataclass(frozen=True)
class Struck:
    """A training that met a fault and went on to its end."""

    run: Run
    hosts: list[str]
    reason: str
    """What `muster status` said while it waited to run again; empty when Slurm had no part in it."""


Strike = Callable[[Cluster, Run, list[str]], None]


def power_off(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    slurm.power_off(hosts[1])


def cut(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    slurm.cut(hosts[1])


def cut_and_heal(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    """It comes back with ranks of the first attempt alive on it, if they did not end themselves."""
    slurm.cut(hosts[1])
    slurm.until("a requeue", lambda: slurm.job(run.job_id)["Restarts"] == "1")
    slurm.heal(hosts[1])


def kill_slurmd(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    """Of the node with rank 0, which lives on, and so does the batch script."""
    slurm.kill_slurmd(hosts[0])


def lose_sight(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    """Of the only node: nothing tells its ranks, and both attempts train at the same time."""
    slurm.kill_slurmd(hosts[0])
    run.until("the second attempt", lambda: len(run.events("attempt")) == 2)


def requeue(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    slurm.run("scontrol", "requeue", run.job_id)


def requeue_while_it_stops(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    """The batch script's own requeue, when the ranks have saved, comes in the middle of this one."""
    slurm.run("scancel", "--signal=USR2", run.job_id)
    slurm.run("scontrol", "requeue", run.job_id)


def set_down(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    slurm.set_down(hosts[1])


def preempt(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    options = ["--partition=high", f"--nodelist={','.join(hosts)}", "--nodes=2", "--exclusive", "--output=/dev/null"]
    slurm.sbatch(*options, "--wrap", "sleep 1")


def time_limit(slurm: Cluster, run: Run, hosts: list[str]) -> None:
    """The notice comes 35 s before the end; Slurm looks every 30 s."""
    slurm.run("scontrol", "update", f"JobId={run.job_id}", "EndTime=now+40seconds")
    run.until("a requeue", lambda: slurm.job(run.job_id)["Restarts"] == "1")
    slurm.run("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=30")  # that end had become its limit


# What `muster status` says of the job that waits to run again; the batch script requeues those that saved in time.
OF_SLURM: dict[Strike, str] = {
    time_limit: "DUE TO JOB REQUEUE",
    power_off: "Node failure on {hosts[1]}",
    cut: "Node failure on {hosts[1]}",
    cut_and_heal: "Node failure on {hosts[1]}",
    kill_slurmd: "Node failure on {hosts[0]}",
    set_down: "Node failure on {hosts[1]}",
    requeue: "DUE TO JOB REQUEUE",
    requeue_while_it_stops: "DUE TO JOB REQUEUE",
    preempt: "DUE TO JOB REQUEUE",
}
OF_A_RANK = {"raise": "user code", "kill": "killed", "stop": "hung"}
RARELY: list[Strike | str] = [] if FULL else [power_off, cut, requeue, "raise", "stop"]
"""Only in `make test-full`: for each of them another fault shows nearly the same to Slurm, or the tests without it."""


def usual(*faults: Strike | str) -> list[Strike | str]:
    """Those that every run of the tests tries."""
    return [fault for fault in faults if fault not in RARELY]


def train(slurm: Cluster, folder: Path, fault: Strike | str) -> Struck:
    """Train, be struck, go on: at full speed, once what Slurm does about it is seen."""
    folder.mkdir()
    site, go_on = folder / "site.yaml", folder / "go on"
    site.write_text("sbatch_args: [--exclusive]\n")  # a fault of a host shall strike one training
    words = ["--site", site, f"task_args.until={go_on}"]
    if isinstance(fault, str):
        go_on.touch()
        words += [f"task_args.what={fault}", "task_args.rank=3", f"task_args.once={folder}/once"]
    if fault is lose_sight:
        words += ["nodes=1", "devices_per_node=4"]
    run = submit(folder, *words)
    run.wait_step(1 if fault is time_limit else 12)
    hosts = slurm.run("scontrol", "show", "hostnames", slurm.job(run.job_id)["NodeList"]).stdout.split()
    reason = ""
    if not isinstance(fault, str):
        fault(slurm, run, hosts)
        if fault is not lose_sight:
            reason = run.until("a requeue", lambda: state.reason if (state := run.state()).phase == "pending" else "")
        go_on.touch()
    status = run.wait_end(180)
    assert status["state"] == "done", run.describe()
    return Struck(run, hosts, reason)


@pytest.fixture(scope="module")
def cluster(slurm_programs: None) -> Iterator[Cluster]:
    """A larger one, of this file's own: these tests have a worker of their own too."""
    with Cluster(LAYOUT, shared=[ROOT]) as cluster, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", cluster.path)
        yield cluster


@pytest.fixture(scope="module")
def struck(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[dict[Strike | str, Future[Struck]]]:
    """A training for each fault that a chosen test asks for."""
    chosen = [item.callspec.params["fault"] for item in request.session.items if item.module is request.module]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {
            fault: pool.submit(train, cluster, cluster.session / getattr(fault, "__name__", str(fault)), fault)
            for fault in dict.fromkeys(chosen)
        }
        pool.shutdown(cancel_futures=True)


Runs = dict[Strike | str, Future[Struck]]


@pytest.mark.parametrize("fault", usual(*OF_SLURM), ids=lambda fault: fault.__name__)
def test_the_job_comes_back_with_the_cause_and_ends_with_the_same_bits(
    struck: Runs, reference: Run, fault: Strike
) -> None:
    found = struck[fault].result()
    assert f"requeued ({OF_SLURM[fault].format(hosts=found.hosts)}), Slurm says: " in found.reason
    assert same_weights(found.run, reference), found.run.describe()


@pytest.mark.parametrize("fault", usual(time_limit, requeue, preempt), ids=lambda fault: fault.__name__)
def test_with_notice_no_step_is_lost_and_no_restart_is_counted(struck: Runs, fault: Strike) -> None:
    run = struck[fault].result().run
    (stopped,), (resumed,) = run.events("stopped"), run.events("resume")
    assert resumed["step"] == stopped["step"], run.describe()
    assert not run.events("failure", "restart")


@pytest.mark.parametrize("fault", [lose_sight])
def test_an_attempt_that_was_replaced_commits_nothing(
    cluster: Cluster, struck: Runs, reference: Run, fault: Strike
) -> None:
    found = struck[fault].result()
    assert [event["attempt"] for event in found.run.events("attempt", "restart")] == [0, 1]
    (stale,) = cluster.until("the end of the first attempt", lambda: found.run.events("ended"))
    assert "replaced by attempt 1" in stale["reason"]
    assert same_weights(found.run, reference)


@pytest.mark.parametrize("fault", usual(cut, kill_slurmd, lose_sight), ids=lambda fault: fault.__name__)
def test_whom_slurm_cannot_reach_ends_himself(cluster: Cluster, struck: Runs, fault: Strike) -> None:
    found = struck[fault].result()
    host = found.hosts[fault is cut]
    agents = ("pgrep", "--full", "--", r"muster(\.py)? agent")
    cluster.until("its end", lambda: cluster.on_host(host, *agents, check=False).returncode == 1)


@pytest.mark.parametrize("fault", usual(*OF_A_RANK))
def test_a_rank_fails_and_all_start_again_in_the_same_allocation(
    cluster: Cluster, struck: Runs, reference: Run, fault: str
) -> None:
    found = struck[fault].result()
    (failure,) = found.run.events("failure")
    said = (failure["kind"], failure["rank"], failure["node"], failure["host"])
    assert said == (OF_A_RANK[fault], 3, 1, found.hosts[1]), failure
    assert cluster.job(found.run.job_id)["Restarts"] == "0"
    assert same_weights(found.run, reference)
