"""Runs on the test cluster, as a user makes them with `muster`, and what must be equal in the end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paths import ROOT

from trainer.launch.platform import JobStatus, find_platform
from trainer.run.folder import RunFolder

MUSTER = Path(sys.executable).with_name("muster")


def muster(*words: object, check: bool = True, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command; with `check`, its failure is the test's."""
    command = [str(word) for word in (MUSTER, *words)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # each host believes that the machine's cores are its own
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=cwd, env=env)
    assert not check or done.returncode == 0, f"muster {words}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def job_id(self) -> str:
        return str(json.loads((self.folder / "handle.json").read_text())["job_id"])

    def events(self, *names: str) -> list[dict[str, Any]]:
        found = RunFolder(self.folder).read_events()
        return [event for event in found if not names or event["event"] in names]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(muster("status", self.folder, "--json").stdout)
        return found

    def state(self) -> JobStatus:
        """What the platform says, without starting a process for the asking."""
        handle = json.loads((self.folder / "handle.json").read_text())
        return find_platform(handle["platform"]).status(RunFolder(self.folder), handle)

    def step(self) -> int:
        """The last step whose loss was written."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines and lines[-1].endswith("}") else 0

    def until(self, what: str, ready: Callable[[], Any], timeout_s: float = 240) -> Any:
        """Wait for something true, and return it."""
        end = time.monotonic() + timeout_s
        while not (value := ready()):
            assert time.monotonic() < end, f"{what}: not within {timeout_s:.0f} s\n{self.describe()}"
            time.sleep(0.2)
        return value

    def wait_step(self, step: int) -> None:
        self.until(f"step {step}", lambda: self.step() >= step)

    def wait_end(self, timeout_s: float = 240) -> dict[str, Any]:
        """Wait until it is neither pending nor running, and return its status."""
        self.until("the end", lambda: not self.state().is_active, timeout_s)
        return self.status()

    def weights(self) -> dict[str, torch.Tensor]:
        newest = sorted((self.folder / "checkpoints").glob("step-*"))[-1]
        state: dict[str, torch.Tensor] = torch.load(newest / "model.pt", weights_only=True)
        return state

    def describe(self) -> str:
        texts = [json.dumps(event) for event in self.events()[-12:]]
        for log in sorted((self.folder / "logs").glob("*")):
            texts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}")
        return "\n".join(texts)


def submit(runs: Path, *words: object, job: object = "tests/support/slow.yaml", on: str = "slurm") -> Run:
    """Submit a job from the checkout."""
    return Run(Path(muster("submit", job, f"runs={runs}", *words, "--on", on).stdout.strip()))


def same_weights(first: Run, second: Run) -> bool:
    """Whether two runs ended with the same bits."""
    one, two = first.weights(), second.weights()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def uninterrupted(runs: Path, *words: object) -> Run:
    """The same training on this machine, at full speed, with nothing in its way."""
    run = submit(runs, "task_args.step_s=0", *words, on="local")
    assert run.wait_end()["state"] == "done", run.describe()
    return run
