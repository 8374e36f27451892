"""Runs of the GPU tier, by the command that people use, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT, SUPPORT

from trainer.records import read_lines
from trainer.run.folder import RunFolder

MUSTER = [sys.executable, "-c", "from trainer.launch.cli import main; main()"]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH")]))
}


def command(runs: Path, job: str, *overrides: str) -> tuple[list[str], str]:
    """The command that runs a job on one GPU, and how its run folder's name begins."""
    name = f"gpu{len(list(runs.iterdir())) if runs.exists() else 0}"
    words = [f"jobs/{job}.yaml", "device=cuda", "devices_per_node=1", f"runs={runs}", f"name={name}", *overrides]
    return [*MUSTER, "run", *words], name


def train(runs: Path, job: str, *overrides: str) -> Path:
    """Run a job to its end on the GPU; return its run folder."""
    words, name = command(runs, job, *overrides)
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = runs.glob(f"{name}-*")
    return run


def all_gpus(at_least: int = 2) -> str:
    """The override for as many ranks as there are GPUs."""
    count = torch.cuda.device_count()
    if count < at_least:
        pytest.skip(f"needs {at_least} GPUs, found {count}")
    return f"devices_per_node={count}"


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"]


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    state: dict[str, torch.Tensor] = torch.load(newest / "model.pt", weights_only=True, map_location="cpu")
    return state


def same_bits(first: Path, second: Path) -> None:
    """Compare the weights of two runs' last checkpoints."""
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(second)[name]), name


def train_killed(runs: Path, job: str, *overrides: str, rank: int = 0) -> Path:
    """Like `train`, with SIGKILL to a rank after the first checkpoint."""
    words, name = command(runs, job, *overrides)
    with open(runs / f"{name}.log", "w+") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
        killed, end = False, time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
            events = [event for folder in runs.glob(f"{name}-*") for event in RunFolder(folder).read_events()]
            if not killed and any(event["event"] == "checkpoint" for event in events):
                pids = next(event["pids"] for event in events if event["event"] == "ranks")
                os.kill(pids[str(rank)], signal.SIGKILL)
                killed = True
        process.kill()  # if it is still there: it holds the GPU
        log.seek(0)
        assert process.wait() == 0 and killed, log.read()
    (run,) = (path for path in runs.glob(f"{name}-*") if path.is_dir())
    return run
