"""Runs whose pods are real containers, for the tests: submitted by `muster`, and looked at on their claim."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_job_controller import Pods

from trainer.launch import control
from trainer.launch.submit import submit_job
from trainer.records import read_lines
from trainer.run.folder import RunFolder

STEPS = 150
"""Long enough to be disturbed after a checkpoint, which is written beside the training."""
JOB = [
    "nodes=2",
    "device=cpu",
    f"train.steps={STEPS}",
    "checkpoint.every_steps=10",
    "log.every_steps=1",
]
WAIT_S = 180


class Runs:
    """Submits jobs to the cluster, and looks at what they leave on the claim."""

    def __init__(self, pods: Pods, folder: Path) -> None:
        self.pods, self.folder = pods, folder
        self.claim = pods.make_claim("runs")
        self.site = folder / "site.yaml"
        self.site.write_text("claim: runs\n")

    def submit(self, *overrides: str, devices: int = 1, job: str = "jobs/digits.yaml") -> Path:
        """The run folder on this machine; the one on the claim has its name."""
        words = [*JOB, f"devices_per_node={devices}", f"runs={self.folder / 'runs'}", *overrides]
        return submit_job(job, words, "kubernetes", self.site).path

    def wait(self, run: Path, *states: str) -> dict[str, Any]:
        """The status, once it is one of `states`."""
        end = time.monotonic() + WAIT_S
        while True:
            found = control.status(str(run))
            if found["state"] in states:
                return found
            if time.monotonic() > end:
                raise AssertionError(f"not {states} within {WAIT_S} s: {found}\n{self.printed(run)}")
            time.sleep(0.5)

    def events(self, run: Path, name: str) -> list[dict[str, Any]]:
        return [line for line in RunFolder(self.claim / run.name).read_events() if line["event"] == name]

    def until(self, run: Path, what: Callable[[], Any]) -> Any:
        """What `what` returns, once it is true."""
        end = time.monotonic() + WAIT_S
        while not (found := what()):
            assert time.monotonic() < end, self.printed(run)
            time.sleep(0.05)
        return found

    def checkpoint(self, run: Path, count: int) -> None:
        self.until(run, lambda: len(self.events(run, "checkpoint")) >= count)

    def losses(self, run: Path) -> dict[int, float]:
        """The newest loss of each step."""
        lines = read_lines(self.claim / run.name / "metrics.jsonl")
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

    def printed(self, run: Path) -> str:
        return "\n".join(
            f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted((run / "logs").glob("node-*.log"))
        )
