"""kill -9 of any rank, again and again: the job goes on within the second, and ends with the weights of a calm run."""

from __future__ import annotations

import os
import random
import re
import statistics
import time
from contextlib import suppress
from pathlib import Path

import pytest
from muster_runs import FULL, HERE, Run, children, kill, result, stat, submitted, wait_for
from ranks import complete, make_job
from states import difference, read_state
from stopwatch import Stopwatch

from trainer.agent.scratch_folder import SHM

ONE_NODE = ["devices_per_node=2"]
TWO_NODES = ["nodes=2", "devices_per_node=2"]
GOAL_S = {"one node": 0.5, "two nodes": 1.5}
"""Median from a kill to the next completed step, on a machine with nothing else to do."""


def kill_and_wait(run: Run, rank: int, pause_s: float) -> float:
    """Kill a rank some time after its attempt saved; return the seconds until a step of the next attempt is done."""
    count = len(run.events("first_step"))
    attempt = run.events("first_step")[-1]["attempt"]
    wait_for("progress", lambda: any(event["attempt"] == attempt for event in run.events("checkpoint")))
    time.sleep(pause_s)
    killed = time.time()
    kill(run.ranks()[rank])
    seconds: float = run.wait("first_step", count + 1)["time"] - killed
    return seconds


@pytest.mark.parametrize("topology, keys, kills", [
    ("one node", ONE_NODE, 50 if FULL else 6),
    ("two nodes", TWO_NODES, 20 if FULL else 3),
])  # fmt: skip
def test_killed_ranks_change_nothing(
    tmp_path: Path, topology: str, keys: list[str], kills: int, stopwatch: Stopwatch
) -> None:
    """Restarts with progress in between use up no budget: there are more kills than restarts to spend."""
    keys = [*keys, f"train.steps={kills * 40 + 40}", "agent.restarts=2"]
    expected = complete(tmp_path / "calm", make_job(*keys, file=HERE / "faulty.yaml")).folder
    chance = random.Random(kills)
    with submitted(tmp_path / "killed", *keys, "task_args.step_s=0.01") as run:
        run.wait("first_step")
        ranks = len(run.ranks())
        times = [kill_and_wait(run, chance.randrange(ranks), chance.uniform(0, 0.1)) for _ in range(kills)]
        assert result(run, 120) == 0, run.log("node-0.log")
        assert [event["kind"] for event in run.events("failure")] == ["killed"] * kills
    assert difference(read_state(expected), read_state(run.folder)) == ""
    print(
        f"\n{topology}: {kills} kills, seconds to the next step: median {statistics.median(times):.2f}, "
        f"largest {max(times):.2f}"
    )
    stopwatch.check(statistics.median(times), GOAL_S[topology], "the median recovery")


def shared_memory(run: Run) -> set[str]:
    """The files in /dev/shm that the run's processes use now."""
    maps = ""
    for pid in run.processes():
        with suppress(OSError):
            maps += Path(f"/proc/{pid}/maps").read_text()
    return set(re.findall(rf"{SHM}/(\S+)$", maps, re.MULTILINE))


def resources(run: Run, used: set[str]) -> dict[str, int]:
    """What the agent and the template hold, and what is left of ranks and in the shared memory that they `used`."""
    agent = run.agents()[0]
    template = run.template(0)
    found = {"zombies": sum(stat(pid)[:1] == ["Z"] for pid in children(agent) + children(template))}
    for name, pid in (("agent", agent), ("template", template)):
        found[f"{name} threads"] = len(os.listdir(f"/proc/{pid}/task"))
        found[f"{name} files"] = len(os.listdir(f"/proc/{pid}/fd"))
    found["children"] = len(children(agent)) + len(children(template))
    found["shared memory"] = len([path for path in SHM.iterdir() if path.name in used])
    return found


def test_restarts_leak_nothing(tmp_path: Path) -> None:
    """The template, which is forked again and again, has one thread, and never more."""
    kills = 200 if FULL else 8
    keys = [*ONE_NODE, "train.steps=1000000", "task_args.step_s=0.01", "data.workers=1"]
    with submitted(tmp_path, *keys) as run:
        run.wait("first_step")
        for _ in range(3):
            kill_and_wait(run, 1, 0)
        run.wait("checkpoint", len(run.events("checkpoint")) + 1)  # whoever writes them is there, too
        used = shared_memory(run)
        before = resources(run, used)
        assert before["template threads"] == 1
        for number in range(kills):
            for worker in children(run.ranks()[number % 2]):  # as torch does a moment before it unlinks it again
                (SHM / f"torch_{worker}_1_1").touch()
                used.add(f"torch_{worker}_1_1")
            used |= shared_memory(run)
            kill_and_wait(run, number % 2, 0)
        assert_soon_no_more(run, used, before)


def assert_soon_no_more(run: Run, used: set[str], before: dict[str, int]) -> None:
    """Within 20 seconds."""
    end = time.monotonic() + 20
    while (more := {key: value for key, value in resources(run, used).items() if value > before[key]}) and (
        time.monotonic() < end
    ):
        time.sleep(0.1)
    assert not more, f"more than {before}"
