"""Training in containers through `muster run --on docker`: shapes, faults, and the same weights in the end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine
from engine_image import Image

ROOT = Path(__file__).resolve().parents[2]
MUSTER = Path(sys.executable).with_name("muster")
SLOW = ("nodes=2", "devices_per_node=1", "train.steps=50", "task_args.step_s=0.2", "agent.grace_s=10")


class Runs:
    """Runs of one test."""

    def __init__(self, engine: Engine, image: Image, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.site = folder / "site.yaml"
        self.site.write_text(f"image: {image.tag}\n")
        self.environment = os.environ | engine.env

    def muster(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(MUSTER), *map(str, words)], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=150
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, *words: str, on: str = "docker", job: str = "jobs/digits.yaml") -> Path:
        site = ["--site", str(self.site)] if on == "docker" else []
        words = (job, f"runs={self.folder / 'runs'}", *words)
        return Path(self.muster("submit", *words, "--on", on, *site).stdout.strip())

    def status(self, run: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.muster("status", run, "--json").stdout)
        return found

    def wait_end(self, run: Path) -> dict[str, Any]:
        return until(lambda: s if (s := self.status(run))["state"] not in ("running", "pending") else None, run)


def until(ready: Callable[[], Any], run: Path, timeout_s: float = 120) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := ready()):
        logs = "".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted((run / "logs").glob("*.log")))
        assert time.monotonic() < end, (run / "events.jsonl").read_text()[-2000:] + logs
        time.sleep(0.2)
    return value


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == name]


def wait_step(run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    until(
        lambda: path.exists() and any(json.loads(line)["step"] >= step for line in path.read_text().splitlines()), run
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    state: dict[str, torch.Tensor] = torch.load(newest / "model.pt", weights_only=True)
    return state


def same_weights(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def runs(engine: Engine, image: Image, tmp_path: Path) -> Runs:
    return Runs(engine, image, tmp_path)


@pytest.mark.parametrize(
    "shape",
    [("parallel=single",), ("parallel=dp",), ("nodes=2", "devices_per_node=1")],
    ids=["single", "dp", "two nodes"],
)
def test_the_main_job_trains(runs: Runs, shape: tuple[str, ...]) -> None:
    run = runs.submit(*shape, "train.epochs=4")
    status = runs.wait_end(run)
    assert status["state"] == "done", status
    assert status["metrics"]["accuracy"] > 0.9
    owner = (run / "result.json").stat()
    assert (owner.st_uid, owner.st_gid) == (os.getuid(), os.getgid())
    assert run.name not in runs.engine.docker("network", "ls", "--format", "{{.Name}}").stdout


def test_a_killed_container_comes_back_and_a_stopped_one_loses_nothing(runs: Runs) -> None:
    slow = "tests/slurm/slow.yaml"  # user code beside its job file: it reaches the containers by the run's snapshot
    reference = runs.submit(*SLOW, on="local", job=slow)
    run = runs.submit(*SLOW, job=slow)
    name = f"muster-{run.name}"
    wait_step(run, 7)
    runs.engine.docker("kill", f"{name}-1")
    until(lambda: events(run, "restart"), run)
    resumed = events(run, "resume")
    wait_step(run, 25)
    runs.engine.docker("stop", f"{name}-0")
    until(lambda: events(run, "requeued"), run)
    assert runs.wait_end(run)["state"] == "done"
    (stopped,) = events(run, "stopped")
    assert events(run, "resume")[-1]["step"] == stopped["step"]
    assert len(events(run, "resume")) > len(resumed)
    assert runs.wait_end(reference)["state"] == "done"
    assert same_weights(run, reference)


def test_small_shared_memory_is_noticed_before_the_crash(runs: Runs) -> None:
    runs.site.write_text(runs.site.read_text() + "shm: 64m\n")
    run = runs.submit("parallel=single", "data.workers=2")
    status = runs.wait_end(run)
    assert (status["state"], status["code"]) == ("failed", 64)
    assert "/dev/shm" in status["reason"] and "--shm-size" in status["reason"]


def test_without_image_or_engine_one_line_names_the_remedy(runs: Runs) -> None:
    runs.site.write_text("image: nothing-of-that-name\n")
    done = runs.muster("run", "jobs/digits.yaml", "--on", "docker", "--site", runs.site, check=False)
    assert done.returncode == 64
    assert "make docker-build" in done.stderr and "Traceback" not in done.stderr
    runs.environment = runs.environment | {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
    done = runs.muster("run", "jobs/digits.yaml", "--on", "docker", "--site", runs.site, check=False)
    assert done.returncode == 64
    assert done.stderr.count("\n") == 1 and "systemctl start docker" in done.stderr
