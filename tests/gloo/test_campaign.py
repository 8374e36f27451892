"""Random faults on one run after another: the weights of a calm run, each sample once, the cause named, nothing left.

A small sample, always the same one, unless FULL: then MUSTER_SEED, or chance, chooses. What was chosen is printed.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from campaign_faults import FAULTS, NEEDS_SHIM, campaign_of
from muster_runs import FULL, HERE, Run, end_all, start_agent, submitted
from ranks import complete, make_job, samples_of_steps
from shim import Shim, compiler
from states import difference, read_state
from two_hosts import ADDRESSES, two_hosts

from trainer.run.goodput import TICKS

SEED = int(os.environ.get("MUSTER_SEED") or (random.randrange(1, 10**6) if FULL else 9))
STEP_S = 0.02
KEYS = [
    "train.schedule=constant", "task_args.noise=true", "log.samples=true", "checkpoint.every_steps=10",
    "agent.hang_timeout_s=4", "agent.restarts=1000", "agent.restarts_total=1000",
]  # fmt: skip
DISKS = ("full disk", "input/output errors")
LONG = ("stop a rank",)
"""Takes as long as the patience with silent ranks; in the short run others show it."""
TOPOLOGIES = {"one node": ["devices_per_node=2"], "two nodes": ["nodes=2", "devices_per_node=1"]}
SmallDisk = Callable[[str], Path]


def usable(*without: str) -> list[str]:
    """The faults that can be made here."""
    return [name for name in FAULTS if name not in without and (compiler() or name not in NEEDS_SHIM)]


def assert_as_if_nothing_had_happened(run: Run, calm: Path, keys: list[str], whole: bool) -> None:
    """Same weights; each step has its samples, in their order. `whole`: no line of that record was lost."""
    job = make_job(*KEYS, *keys, f"train.steps={run.events('done')[-1]['step']}", file=HERE / "faulty.yaml")
    complete(calm, job)
    assert difference(read_state(calm), read_state(run.folder)) == ""
    found, expected = samples_of_steps(run.folder), samples_of_steps(calm)
    assert not whole or found.keys() == expected.keys()
    different = [at for at in found if sorted(found[at]) != sorted(expected[at])]
    assert not different if whole else len(different) < 0.2 * len(expected), different


@pytest.mark.timeout(3600 if FULL else 600)
@pytest.mark.parametrize("topology", TOPOLOGIES if FULL else ["one node"])
def test_any_fault_at_any_moment(
    tmp_path: Path, topology: str, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = usable(*(() if FULL else LONG))
    chance = random.Random(SEED)
    order = chance.sample(names, len(names)) + (chance.choices(names, k=20) if FULL else [])
    disk, shim = small_disk("64m"), Shim(tmp_path) if compiler() else None
    with monkeypatch.context() as patch:
        for name, value in shim.variables.items() if shim else ():
            patch.setenv(name, value)
        keys = TOPOLOGIES[topology]
        with submitted(disk, *KEYS, *keys, "train.steps=1000000", f"task_args.step_s={STEP_S}") as run:
            with campaign_of(run, SEED, shim) as campaign:
                for name in order:
                    campaign.strike(name)
                campaign.finish()
            campaign.assert_nothing_left()
            assert 0 < run.status()["goodput"] <= 1
            patch.undo()
            assert_as_if_nothing_had_happened(run, tmp_path / "calm", keys, whole=not set(order) & set(DISKS))


def usual_pace(run: Run) -> float:
    """Seconds of a step, where nothing disturbs it."""
    ticks = run.events("checkpoint")
    pairs = [(one, two) for one, two in pairwise(ticks) if one["attempt"] == two["attempt"]]
    return statistics.median((two["time"] - one["time"]) / (two["step"] - one["step"]) for one, two in pairs)


def seconds_of_a_start() -> float:
    """Of a Python process that imports numpy."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    return time.monotonic() - began


if FULL:

    @pytest.mark.timeout(3600)
    def test_a_hundred_faults_cost_what_each_costs(tmp_path: Path) -> None:
        """Goodput is at least 0.95 of what the model of recovery says: a pause costs its time, another fault what the
        first five of its kind did, before the hundred: notice, start, state, repeated steps. Nothing piles up.

        It trains for a second between two faults; else goodput would be a small difference of large noisy numbers. How
        fast the machine is at a time, on which others may be at work, the start of a Python process tells.
        """
        chance = random.Random(SEED)
        names = usable(*DISKS, *LONG, "kill the supervisor", "jump of the clock")
        with submitted(tmp_path, *KEYS, *TOPOLOGIES["one node"], "train.steps=1000000", "task_args.step_s=0.02") as run:
            with campaign_of(run, SEED) as campaign:
                speeds: list[float] = []
                for name in names * 5:
                    speeds.append(seconds_of_a_start())
                    campaign.strike(name)
                first, began = campaign.costs.copy(), run.events(*TICKS)[-1]
                for name in chance.choices(names, k=100):
                    time.sleep(1)
                    speeds.append(seconds_of_a_start())
                    campaign.strike(name)
                ended = run.events(*TICKS)[-1]
                campaign.finish()
            campaign.assert_nothing_left()
            pace, hundred = usual_pace(run), campaign.costs[-100:]
            now = [statistics.median(speeds[max(at - 5, 0) : at + 6]) for at in range(len(speeds))]
            usual = {
                name: statistics.mean(each.excess(pace) / now[at] for at, each in enumerate(first) if each.name == name)
                for name in names
            }
            for name in names:
                found = [each.excess(pace) for each in hundred if each.name == name]
                rest = f"then {statistics.median(found):.2f} s, at most {max(found):.2f} s" if found else "then never"
                print(f"{len(found)} x {name}: {usual[name] * now[0]:.2f} s at first, {rest}")
            took = ended["time"] - began["time"]
            lost = sum(usual[each.name] * start_s for each, start_s in zip(hundred, now[-100:], strict=True))
            predicted = 1 - (lost + sum(each.paused_s for each in hundred)) / took
            print(f"a Python process started in {min(now):.3f} to {max(now):.3f} s")
            share = (ended["step"] - began["step"]) * pace / took
            print(f"{share:.1%} of the time of a hundred faults went into steps, {predicted:.1%} were predicted")
            print(run.status()["goodput_text"])
            assert share >= 0.95 * predicted
            assert_as_if_nothing_had_happened(run, tmp_path / "calm", TOPOLOGIES["one node"], whole=True)

    @pytest.mark.timeout(600)
    def test_a_cable_that_is_cut_between_two_hosts(tmp_path: Path) -> None:
        """For moments: nobody minds. For longer: each names the other and ends, and both go on when started again."""
        keys = [*KEYS, "devices_per_node=1", "train.steps=900", "agent.hang_timeout_s=60", "agent.rejoin_timeout_s=3"]
        run = Run(tmp_path / "run")
        with two_hosts() as hosts:
            try:
                for launch in ("0", "1"):
                    agents = [
                        start_agent(
                            run, node, 2, *keys, "task_args.step_s=0.02", enter=hosts.enter(node),
                            MUSTER_PLATFORM="docker", MUSTER_HOSTNAMES=",".join(ADDRESSES), MUSTER_LAUNCH=launch,
                        )
                        for node in (0, 1)
                    ]  # fmt: skip
                    run.wait("first_step", int(launch) + 1, 120)
                    hosts.cut()
                    time.sleep(3)
                    if launch == "1":
                        hosts.heal()
                        break
                    assert not run.events("failure", "ended")
                    assert [agent.wait(90) for agent in agents] == [1, 1]
                    hosts.heal()
                assert [agent.wait(120) for agent in agents] == [0, 0], (run.folder / "agent-0.txt").read_text()
            finally:
                end_all(run)
        for node in (0, 1):
            said = (run.folder / f"agent-{node}.txt").read_text()
            assert "peer lost" in said and f"node {1 - node}" in said, said
        assert [event["attempt"] for event in run.events("first_step")] == [0, 1]
        assert_as_if_nothing_had_happened(run, tmp_path / "calm", ["nodes=2", "devices_per_node=1"], whole=True)
