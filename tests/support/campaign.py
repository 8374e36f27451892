"""A campaign of faults against one run: what strikes at random, what the run must say of it, and that it goes on.

MUSTER_SEED chooses the faults; seed and faults are printed, so that those of a run that failed can be had again.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from muster_runs import Run, muster, result, wait_for
from shim import Shim

from trainer.agent.scratch_folder import SHM
from trainer.records import read_json
from trainer.run.folder import RunFolder
from trainer.run.goodput import TICKS

PATIENCE_S = 240.0
TROUBLE = ("failure", "hung", "agent_lost", "restart", "attempt", "ended")
"""Events of a run that somebody disturbed."""
ENDS = ("failure", "agent_lost", "attempt")
"""Those of them that another attempt follows, or that tell of one."""


class Outcome(NamedTuple):
    """What must follow a fault; without an event nothing may."""

    event: str = ""
    kinds: tuple[str, ...] = ()
    """Of failures: what the cause may be called. Others that are named besides follow from it."""


NOTHING = Outcome()


class Cost(NamedTuple):
    """What a fault cost: the time from the last step known before it to the last one known when it was behind."""

    name: str
    seconds: float
    steps: int
    paused_s: float
    """How long the ranks stood still, because the fault said so."""

    def excess(self, pace: float) -> float:
        """The seconds beyond those of the steps that were made meanwhile, at so many seconds each, and of the pause."""
        return self.seconds - self.steps * pace - self.paused_s


@dataclass
class Campaign:
    """Faults for one run, one after the other."""

    run: Run
    chance: random.Random
    faults: Mapping[str, Callable[[Campaign], Outcome]]
    shim: Shim | None = None
    costs: list[Cost] = field(default_factory=list)
    paused_s: float = 0.0
    """By the present fault: see `Cost`."""
    pids: set[int] = field(default_factory=set)
    memory: set[str] = field(default_factory=set)
    strangers: list[socket.socket] = field(default_factory=list)

    def strike(self, name: str) -> None:
        """One fault at a random moment; then the run goes on, and has said what happened."""
        self.progress()
        self.note_resources()
        time.sleep(self.chance.uniform(0, 0.3))
        last = self.run.events(*TICKS)[-1]
        before = {event: len(self.run.events(event)) for event in (*TROUBLE, "checkpoint")}
        print(f"{len(self.costs) + 1}. {name} after step {last['step']}", flush=True)
        self.paused_s = 0.0
        outcome = self.faults[name](self)
        if outcome.event:
            self.run.wait(outcome.event, before[outcome.event] + 1, PATIENCE_S)
            self.progress(before["attempt"] + before["restart"] + (outcome.event in ENDS))
        else:
            self.progress()
            self.progress()
        now = self.run.events(*TICKS)[-1]
        self.costs.append(Cost(name, now["time"] - last["time"], now["step"] - last["step"], self.paused_s))
        print(f"   behind after {self.costs[-1].seconds:.1f} s, at step {now['step']}", flush=True)
        said = [event for kind in TROUBLE for event in self.run.events(kind)[before[kind] :]]
        if not outcome.event:
            assert not said, (name, said)
        failures = [event for event in said if event["event"] == "failure"]
        wrong = [event for event in failures if event["kind"] not in (*outcome.kinds, "peer lost")]
        assert not wrong, (name, wrong)
        assert outcome.event != "failure" or failures[0]["kind"] in outcome.kinds, (name, failures)

    def progress(self, attempts: int = 1) -> None:
        """Wait until the newest attempt, of at least so many, has made a step and saved.

        Events are counted: after a jump of the clock their times stand still until it has caught up.
        """
        before = len(self.run.events("checkpoint"))

        def saved() -> bool:
            begun = self.run.events("attempt", "restart")
            newest = max((event["attempt"] for event in begun), default=-1)
            steps = self.run.events("first_step", "checkpoint")
            first = any(event["attempt"] == newest for event in steps if event["event"] == "first_step")
            fresh = [event for event in steps if event["event"] == "checkpoint"][before:]
            return len(begun) >= attempts and first and any(event["attempt"] == newest for event in fresh)

        try:
            wait_for("progress", saved, PATIENCE_S)
        except AssertionError:
            print(json.dumps(RunFolder(self.run.folder).read_events()[-20:], indent=1), self.run.status())
            raise

    def note_resources(self) -> None:
        """What the run's processes are and have in shared memory at this moment."""
        found = self.run.processes()
        self.pids |= set(found)
        for pid in found:
            with suppress(OSError):
                self.memory |= set(re.findall(rf"{SHM}/(\S+)$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE))

    # Who can be struck.
    def rank(self) -> int:
        return self.chance.choice(list(self.run.ranks().values()))

    def agent(self) -> int:
        return self.chance.choice(list(self.run.agents().values()))

    def supervisor(self) -> int:
        return int((read_json(self.run.folder / "handle.json") or {})["pid"])

    def continue_run(self, *words: str) -> None:
        """Submit it again."""
        done = muster("submit", self.run.folder, *words)
        assert done.returncode == 0, done.stderr

    def finish(self) -> int:
        """Stop the run, and let it be done after some more steps; return the last."""
        assert muster("cancel", self.run.folder).returncode == 0
        result(self.run, PATIENCE_S)
        step = int(self.run.events("stopped")[-1]["step"]) + 5
        self.continue_run(f"train.steps={step}")
        assert result(self.run, PATIENCE_S) == 0, self.run.log("node-0.log")
        return step

    def assert_nothing_left(self) -> None:
        """No process, and so no port; no shared memory, no folder of an agent, no file that was to become another."""
        self.run.wait_gone()
        wait_for("shared memory", lambda: not [name for name in self.memory if (SHM / name).exists()])
        for name in os.listdir(SHM):
            found = re.match(r"torch_(\d+)_", name)
            assert not found or int(found[1]) not in self.pids, name
        folders = [path.name for path in Path("/tmp").glob("muster-agent-*")]
        assert not [name for name in folders if self.pids & {int(word) for word in name.split("-") if word.isdigit()}]
        hidden = [path for path in self.run.folder.rglob(".*") if path.name not in (".lock", ".gitignore")]
        assert not hidden, hidden
