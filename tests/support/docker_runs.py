"""Runs in containers, for the tests: submitted by `muster`, and looked at in their folders."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine import Engine
from engine_image import ROOT, Image

from trainer.run.folder import RunFolder

MUSTER = Path(sys.executable).with_name("muster")


class Runs:
    """Runs of one test."""

    def __init__(self, engine: Engine, image: Image, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.site = folder / "site.yaml"
        self.set_site(f"image: {image.tag}")
        self.environment = os.environ | engine.env

    def set_site(self, *lines: str) -> None:
        """Write the site file; without an image in `lines` the one that it names already stays."""
        before = [] if any(line.startswith("image:") for line in lines) else self.site.read_text().splitlines()[:1]
        self.site.write_text("\n".join([*before, *lines]) + "\n")

    def muster(self, *words: object, check: bool = True, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        """`prefix`: a program that starts muster."""
        done = subprocess.run(
            [*prefix, str(MUSTER), *map(str, words)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, *words: str, on: str = "docker", job: str = "jobs/digits.yaml") -> Path:
        """The run folder."""
        return Path(self.muster("submit", *self.words(*words, on=on, job=job)).stdout.strip())

    def words(self, *words: str, on: str = "docker", job: str = "jobs/digits.yaml") -> tuple[str, ...]:
        """What a verb of muster gets: job, overrides, platform, site."""
        site = ("--site", str(self.site)) if on == "docker" else ()
        return job, f"runs={self.folder / 'runs'}", *words, "--on", on, *site

    def status(self, run: Path) -> dict[str, Any]:
        return json.loads(self.muster("status", run, "--json").stdout)

    def wait_end(self, run: Path) -> dict[str, Any]:
        """The status at the end; the supervisor writes `exit.json` last of all."""
        until(lambda: (run / "exit.json").exists(), run)
        return self.status(run)


def until(ready: Callable[[], Any], run: Path, timeout_s: float = 240) -> Any:
    """What `ready` returns, once it is true."""
    end = time.monotonic() + timeout_s
    while not (value := ready()):
        logs = "".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted((run / "logs").glob("*.log")))
        assert time.monotonic() < end, f"{RunFolder(run).read_events()[-20:]}{logs}"
        time.sleep(0.05)
    return value


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in RunFolder(run).read_events() if event["event"] == name]


def wait_step(run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    until(
        lambda: path.exists() and any(json.loads(line)["step"] >= step for line in path.read_text().splitlines()), run
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return torch.load(newest / "model.pt", weights_only=True)


def same_weights(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return all(torch.equal(one[name], two[name]) for name in one)
