"""Ranks that hang are noticed by their heartbeat, named, looked into, ended and started again."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from muster_runs import FULL, Run, alive, kill, result, submitted, wait_for
from stopwatch import Stopwatch

HANG_TIMEOUT_S = 3
NOTICE_S = HANG_TIMEOUT_S + 5
RESTART_S = 10
KEYS = [f"agent.hang_timeout_s={HANG_TIMEOUT_S}", "train.steps=1000000", "task_args.step_s=0.01", "agent.restarts=9"]
WORDS = {
    "load: hang": "in <lambda> (faulty_tasks.py",  # in the data set, while the others wait for the gradients
    "hang in C": "in _deadlock (faulty_tasks.py",
    "skip": "called in obey (faulty_tasks.py",  # in a collective that nobody else calls
    "SIGSTOP": "the process is stopped",
}
if FULL:
    WORDS["hang"] = "in <lambda> (faulty_tasks.py"


def hang(run: Run, rank: int, word: str, stopwatch: Stopwatch) -> str:
    """Let a rank hang; return what is said of it, once the next attempt trains."""
    hangs, starts, failures = (len(run.events(name)) for name in ("hung", "first_step", "failure"))
    pids = run.ranks()
    before = {other: run.log(f"stacks-rank-{other}.txt") for other in pids}
    if word == "SIGSTOP":
        os.kill(pids[rank], signal.SIGSTOP)
    else:
        run.order(rank, word)
        wait_for("obedience", lambda: not (run.folder / "orders" / f"rank-{rank}").exists())
    began = time.time()
    noticed = run.wait("hung", hangs + 1)["time"]
    stopwatch.check(noticed - began, NOTICE_S, word)
    failure = run.wait("failure", failures + 1)
    assert (failure["rank"], failure["kind"]) == (rank, "hung"), (word, failure)
    stopwatch.check(run.wait("first_step", starts + 1)["time"] - noticed, RESTART_S, word)
    assert not any(map(alive, pids.values()))
    for other in pids:
        stacks = run.log(f"stacks-rank-{other}.txt").removeprefix(before[other])
        assert "most recent call first" in stacks, (word, other)
    return str(failure["message"])


def test_a_rank_that_hangs_is_named(tmp_path: Path, stopwatch: Stopwatch) -> None:
    with submitted(tmp_path, *KEYS) as run:
        run.wait("first_step")
        for number, (word, place) in enumerate(WORDS.items()):
            message = hang(run, (number + 1) % 2, word, stopwatch)
            assert place in message, (word, message)
            phase = "(training|saving)" if word == "SIGSTOP" else "training"  # a signal comes at any moment
            assert re.search(rf"no heartbeat for \d+ s after step \d+ while {phase}", message), message


@pytest.mark.parametrize("rank", [0, 1] if FULL else [1])
def test_it_is_named_from_another_node_too(tmp_path: Path, rank: int, stopwatch: Stopwatch) -> None:
    """The ranks that wait for it are as silent as it is, and their agent may notice them first."""
    with submitted(tmp_path, *KEYS, "nodes=2", "devices_per_node=1") as run:
        run.wait("first_step")
        assert "the process is stopped" in hang(run, rank, "SIGSTOP", stopwatch)
        assert f"rank {rank} on node {rank}" in run.log("node-0.log")


def test_one_that_never_begins_is_noticed_too(tmp_path: Path, stopwatch: Stopwatch) -> None:
    keys = ["agent.start_timeout_s=5", "agent.restarts=0", "task_args.start_s=3600"]
    with submitted(tmp_path, "train.steps=5", *keys) as run:
        run.wait("ranks")
        began = time.time()
        assert result(run, 40) == 1
        stopwatch.check(run.wait("hung")["time"] - began, 10)
        assert "while starting" in run.status()["reason"] and "in __init__ (faulty_tasks.py" in run.status()["reason"]


def test_a_stopped_script_is_noticed_too(tmp_path: Path) -> None:
    script = tmp_path / "sleep.py"
    script.write_text("import time\ntime.sleep(3600)\n")
    keys = ["task=null", f"script={script}", f"agent.hang_timeout_s={HANG_TIMEOUT_S}", "agent.restarts=0"]
    with submitted(tmp_path, *keys) as run:
        run.wait("ranks")
        time.sleep(HANG_TIMEOUT_S + 1)
        assert run.status()["state"] == "running", "a script that sleeps is none of our business"
        kill(run.ranks()[1], signal.SIGSTOP)
        assert result(run, 40) == 1
        reason = run.status()["reason"]
        assert "rank 1 on node 0" in reason and "[hung]" in reason and "the process is stopped" in reason


def test_a_job_that_is_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    """As by Slurm's suspend or `docker pause`: nobody was late, because everybody stood still."""
    with submitted(tmp_path, *KEYS, "nodes=2", "devices_per_node=1") as run:
        run.wait("checkpoint")
        everybody = run.processes()
        assert set(run.ranks().values()) < set(everybody)
        for pid in everybody:
            kill(pid, signal.SIGSTOP)
        time.sleep(15 + HANG_TIMEOUT_S)  # longer than an agent may be silent, too
        for pid in everybody:
            kill(pid, signal.SIGCONT)
        step = run.events("checkpoint")[-1]["step"]
        time.sleep(HANG_TIMEOUT_S + 2)
        wait_for("more steps", lambda: run.events("checkpoint")[-1]["step"] > step + 20)
        assert not run.events("hung", "failure", "restart", "agent_lost")
