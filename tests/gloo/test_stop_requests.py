"""Stop requests to an agent, a rank, a supervisor or `muster` itself: one checkpoint, exit code 75, no process left."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from muster_runs import (
    FULL,
    HERE,
    MUSTER,
    Run,
    alive,
    children,
    descendants,
    end_all,
    environment,
    followed,
    kill,
    muster,
    result,
    start_agent,
    submitted,
    wait_for,
)
from ranks import complete, make_job
from states import difference, read_state
from stopwatch import Stopwatch

from trainer.checkpoint import files as checkpoint

FOREVER = ["train.steps=1000000", "task_args.step_s=0.01"]
SIGNALS = [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT]


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (proc(5)); Python needs a moment to start."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_at_any_moment(tmp_path: Path) -> None:
    """In start-up, steps, evaluations and saves, to agent or rank: the run ends as one that was left alone."""
    requests = 50 if FULL else 4
    keys = [f"train.steps={10 * requests + 20}", "checkpoint.every_steps=2", "evaluation.every_steps=3",
            "evaluation.batch_size=16"]  # fmt: skip
    expected = complete(tmp_path / "calm", make_job(*keys, file=HERE / "faulty.yaml")).folder
    chance = random.Random(requests)
    run = Run(tmp_path / "run")
    found: list[int] = []
    try:
        for number in range(requests):
            agent = start_agent(run, 0, 1, *keys, "task_args.step_s=0.01")
            wait_for("Python", lambda agent=agent: handles(agent.pid, signal.SIGTERM))  # type: ignore[misc]
            if number % 2:
                count = len(run.events("ranks"))
                wait_for("ranks", lambda count=count: len(run.events("ranks")) > count)  # type: ignore[misc]
                time.sleep(chance.uniform(0, 0.6))
                target = chance.choice([agent.pid, *run.ranks().values()])
            else:
                time.sleep(chance.uniform(0, 5))
                target = agent.pid
            kill(target, chance.choice(SIGNALS))
            found.append(agent.wait(60))
            checkpoint.newest_good(run.folder / "checkpoints")  # raises when there are some and none is whole
            run.wait_gone(2)
        assert start_agent(run, 0, 1, *keys).wait(60) == 0
    finally:
        end_all(run)
    assert set(found) <= {75, 0} and 75 in found, found
    assert difference(read_state(expected), read_state(run.folder)) == ""


@pytest.mark.parametrize("target", ["an agent", "a rank"])
def test_one_process_of_two_nodes_stops_all(tmp_path: Path, target: str) -> None:
    run = Run(tmp_path / "run")
    agents = [start_agent(run, node, 2, *FOREVER) for node in (0, 1)]
    try:
        run.wait("first_step")
        kill(agents[1].pid if target == "an agent" else run.ranks()[1], signal.SIGTERM)
        assert [agent.wait(20) for agent in agents] == [75, 75]
        assert len(run.events("stopped")) == 1
    finally:
        end_all(run)


def test_one_agent_stops_all_while_it_waits_for_another(tmp_path: Path) -> None:
    """Before any rank exists; the request of node 1 is kept for node 0, which comes late."""
    run = Run(tmp_path / "run")
    first = start_agent(run, 0, 2, *FOREVER)
    try:
        wait_for("the other's absence", lambda: "waiting for node 1" in (run.folder / "agent-0.txt").read_text())
        kill(first.pid, signal.SIGTERM)
        assert first.wait(20) == 75
        assert not run.events("ranks", "attempt")
    finally:
        end_all(run)


def test_the_grace_period_is_kept_when_a_step_is_longer(tmp_path: Path, stopwatch: Stopwatch) -> None:
    with submitted(tmp_path, *FOREVER, "agent.grace_s=2") as run:
        run.wait("checkpoint")
        run.order(0, "hang")
        wait_for("obedience", lambda: not (run.folder / "orders" / "rank-0").exists())
        began = time.monotonic()
        assert muster("cancel", run.folder).returncode == 0
        assert result(run, 25) == 75  # the default grace is longer
        seconds = time.monotonic() - began
        assert seconds > 2
        stopwatch.check(seconds, 7)
        status = run.status()
        assert status["state"] == "cancelled" and "agent.grace_s=2" in status["reason"]
        run.wait_gone()


def test_a_script_is_ended_by_the_signal(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text("import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(3600)\n")
    with submitted(tmp_path, "task=null", f"script={script}") as run:
        run.wait("ranks")
        time.sleep(0.5)
        assert muster("cancel", run.folder).returncode == 0
        assert result(run, 20) == 75
        run.wait_gone()
    (HERE / "started").unlink(missing_ok=True)


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with followed(tmp_path, HERE / "faulty.yaml", f"runs={tmp_path}", *FOREVER, "agent.grace_s=60") as (run, process):
        run.wait("first_step")
        run.order(0, "hang")
        wait_for("obedience", lambda: not (run.folder / "orders" / "rank-0").exists())
        kill(process.pid, signal.SIGINT)
        time.sleep(2)
        assert process.poll() is None
        kill(process.pid, signal.SIGINT)
        assert process.wait(5) == 75
        assert process.stdout is not None
        assert "Ctrl-C again to end at once" in process.stdout.read()
        run.wait_gone(5)


def test_a_second_interrupt_to_the_agent_itself(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    agent = start_agent(run, 0, 1, *FOREVER)
    try:
        run.wait("first_step")
        left = descendants(agent.pid)
        run.order(0, "hang")
        wait_for("obedience", lambda: not (run.folder / "orders" / "rank-0").exists())
        for _ in range(2):
            kill(agent.pid, signal.SIGINT)
            time.sleep(0.3)
        assert agent.wait(3) == 130
        wait_for("the end of what it started", lambda: not any(map(alive, left)), 3)
    finally:
        end_all(run)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_followed_run_ends_with_its_follower(tmp_path: Path, number: int) -> None:
    """Saved, as after any stop request: closing the terminal costs no work."""
    with followed(tmp_path, HERE / "faulty.yaml", f"runs={tmp_path}", *FOREVER) as (run, process):
        run.wait("first_step")
        kill(process.pid, number)
        run.wait_gone()
        assert len(run.events("stopped")) == 1
        assert run.status()["state"] == "stopped"


def test_a_supervisor_that_hears_twice_that_its_command_is_gone(tmp_path: Path) -> None:
    """As it does when a command with a progress bar, and so with two threads, is killed: one save, nothing at once."""
    with submitted(tmp_path, *FOREVER) as run:
        run.wait("first_step")
        for _ in range(2):
            kill(run.status()["handle"]["pid"], signal.SIGHUP)
        run.wait_gone()
        assert len(run.events("stopped")) == 1


def test_a_follower_that_is_gone_before_the_supervisor_is_ready(tmp_path: Path) -> None:
    """As soon as there is a supervisor at all: it hears of it all the same."""
    command = [MUSTER, "run", str(HERE / "faulty.yaml"), f"runs={tmp_path}", *FOREVER]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE, env=environment())
    assert process.stdout is not None
    run = Run(Path(process.stdout.readline().removeprefix("run folder: ").strip()))
    try:
        wait_for("a supervisor", lambda: children(process.pid))
        kill(process.pid)
        process.wait()
        run.wait_gone()
        assert not run.events("first_step")
    finally:
        end_all(run)


def test_a_detached_run_outlives_its_supervisor_only_to_save(tmp_path: Path) -> None:
    with submitted(tmp_path, "train.steps=200", "task_args.step_s=0.01") as run:
        run.wait("first_step")
        kill(run.status()["handle"]["pid"])
        run.wait_gone()
        assert len(run.events("stopped")) == 1
        assert run.status()["state"] == "lost"
        assert muster("run", run.folder).returncode == 0
        assert run.status()["state"] == "done"
        assert run.events("training")[1]["step"] == run.events("stopped")[0]["step"]
