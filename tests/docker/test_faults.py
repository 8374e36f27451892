"""Faults of containers: what is killed or stopped comes back with the same weights in the end; what cannot says why."""

import itertools
from pathlib import Path

import pytest
from docker_runs import Runs, events, same_weights, until, wait_step
from engine import Engine
from engine_image import Image

pytestmark = pytest.mark.timeout(600)  # the first test of a session may have to make everything

JOB = "tests/support/slow.yaml"  # user code beside its job file: it reaches the containers by the run's snapshot
SLOW = ("train.steps=30", "task_args.step_s=0.1", "agent.grace_s=10")
PAIR = ("nodes=2", "devices_per_node=1")


@pytest.fixture(scope="module")
def reference(engine_session: Engine, image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job as processes, which nothing disturbs."""
    runs = Runs(engine_session, image, tmp_path_factory.mktemp("reference"))
    run = runs.submit(*SLOW, *PAIR, on="local", job=JOB)
    assert runs.wait_end(run)["state"] == "done"
    return run


def test_a_killed_container_is_replaced_and_its_run_ends_the_same(runs: Runs, reference: Path) -> None:
    run = runs.submit(*SLOW, *PAIR, job=JOB)
    wait_step(run, 12)
    runs.engine.docker("kill", "--signal=KILL", f"muster-{run.name}-1")
    assert runs.wait_end(run)["state"] == "done"
    assert events(run, "restart")
    assert events(run, "resume")[0]["step"] >= 10
    assert same_weights(run, reference)


def test_a_stopped_container_saves_and_its_run_resumes_exactly(runs: Runs, reference: Path) -> None:
    run = runs.submit(*SLOW, "nodes=1", "devices_per_node=2", job=JOB)
    wait_step(run, 12)
    is_confined(runs.engine, f"muster-{run.name}-0")
    runs.engine.docker("stop", f"muster-{run.name}-0")
    until(lambda: events(run, "requeued"), run)
    assert runs.wait_end(run)["state"] == "done"
    (stopped,) = events(run, "stopped")
    assert [event["step"] for event in events(run, "resume")] == [stopped["step"]]
    assert same_weights(run, reference)
    assert runs.engine.docker("volume", "ls", "--quiet").stdout == ""


def is_confined(engine: Engine, name: str) -> None:
    """As pods and compose's containers are: no capabilities, nor a way to get some, and a root that nobody changes."""
    look = (
        "cat /proc/1/status /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max 2>/dev/null; "
        "for folder in /etc /workspace /opt/muster/venv /tmp /dev/shm; do touch $folder/x && echo $folder; done; true"
    )
    said = engine.docker("exec", name, "sh", "-c", look).stdout.split()
    facts = dict(itertools.pairwise(said))
    assert {key: int(facts[key], 16) for key in ("CapEff:", "CapPrm:", "CapBnd:")} == {
        "CapEff:": 0, "CapPrm:": 0, "CapBnd:": 0,
    }  # fmt: skip
    assert facts["NoNewPrivs:"] == "1" and "16384" in said
    assert said[-2:] == ["/tmp", "/dev/shm"] and "/etc" not in said and "/opt/muster/venv" not in said


def test_small_shared_memory_is_noticed_before_the_crash(runs: Runs) -> None:
    runs.set_site("shm: 64m")
    status = runs.wait_end(runs.submit("parallel=single", "data.workers=2"))
    assert (status["state"], status["code"]) == ("failed", 64)
    assert "/dev/shm" in status["reason"] and "--shm-size" in status["reason"]


def test_the_rank_that_was_killed_for_memory_is_named(runs: Runs) -> None:
    runs.set_site("extra_args: [--memory=1200m, --memory-swap=1200m]")
    status = runs.wait_end(runs.submit(job="tests/support/hungry.yaml"))
    assert status["state"] == "failed"
    assert "rank 1 on node 0 (node0) failed first [out of memory]" in status["reason"]
