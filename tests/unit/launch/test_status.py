"""What `muster status` says of a run that goes on, and of one that ended."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.launch.control import status, status_text
from trainer.run.descriptions import duration, number
from trainer.run.folder import RunFolder
from trainer.signals import start_of


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """In the middle of its second attempt, 100 s after it began; its supervisor is this process."""
    run = RunFolder.create(str(tmp_path), "digits", "name: digits\n")
    handle = {"platform": "local", "pid": os.getpid(), "started": start_of(os.getpid())}
    run.handle.write_text(json.dumps(handle))
    now = time.time()

    def event(ago: float, name: str, **fields: Any) -> None:
        with (run.events / "node-0-host.jsonl").open("a") as file:
            file.write(json.dumps({"time": now - ago, "event": name, **fields}) + "\n")

    training = {"steps": 1800, "steps_per_epoch": 45, "world_size": 2, "parallel": "ddp", "device": "cpu"}
    event(100, "attempt", attempt=0)
    event(100, "training", attempt=0, step=0, **training)
    event(60, "failure", node=0, rank=1, kind="killed", cause="", message="ended by SIGKILL", at_step=400, code=-9)
    event(59, "restart", attempt=1)
    event(50, "training", attempt=1, step=390, **training)
    lines = [
        {"kind": "train", "attempt": 0, "step": 399, "time": now - 61, "mean_loss": 9.0, "samples_per_s": 1.0},
        {"kind": "train", "attempt": 1, "step": 400, "time": now - 40, "mean_loss": 0.5, "samples_per_s": 10.0},
        {"kind": "train", "attempt": 1, "step": 500, "time": now - 20, "mean_loss": 0.25, "samples_per_s": 320.0},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.evaluation.write_text(json.dumps({"step": 495, "attempt": 1, "loss": 0.168, "accuracy": 0.9583}))
    return run


def test_a_run_that_goes_on(run: RunFolder) -> None:
    found = status(str(run))
    assert abs(found["elapsed_s"] - 90) < 5, "40 s of the first attempt, and all of this one"
    assert abs(found["left_s"] - (260 - 20)) < 5, "1300 steps at 5 steps/s, less what has passed since the last line"
    lines = status_text(found).splitlines()
    assert lines[:2] == [f"running: {run}", "step 500 of 1800, epoch 12 of 40"]
    assert lines[2].startswith("trained for 9") and ", 320 samples/s, about " in lines[2] and "left" in lines[2]
    assert lines[3:6] == ["train loss 0.2500", "evaluation loss 0.1680  accuracy 0.9583", "restarts 1: killed (1x)"]
    assert lines[-2] == "last failure: rank 1 on node 0 failed [killed]: ended by SIGKILL, at step 400"
    assert lines[-1] == f"on local: process {os.getpid()} on this machine"


def test_a_run_that_ended_has_no_time_left(run: RunFolder) -> None:
    run.exit.write_text('{"code": 0}')
    with (run.events / "node-0-host.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time() - 20, "event": "done", "step": 1800}) + "\n")
    found = status(str(run))
    assert (found["state"], found["left_s"]) == ("done", None) and abs(found["elapsed_s"] - 70) < 5
    assert "left" not in status_text(found)


def test_a_run_that_waits_for_devices_is_pending(run: RunFolder) -> None:
    run.record("pending", reason="waiting for GPUs: 1 of 0")
    found = status(str(run))
    assert (found["state"], found["reason"]) == ("pending", "waiting for GPUs: 1 of 0")
    run.record("wired", node=0)
    assert status(str(run))["state"] == "running"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (95, "95 s"), (119.9, "119 s"), (120, "2 min"), (6000, "100 min"), (7200, "2 h"), (9900, "2.7 h"),
     (86400, "24 h"), (200000, "2.3 d"), (9e6, "104 d")],
)  # fmt: skip
def test_times_are_told_in_one_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_are_short_and_say_something() -> None:
    found = [number(value) for value in (0.0, 0.5, -12.25, 0.00012, 1234.5, 3e12, float("nan"))]
    assert found == ["0.0000", "0.5000", "-12.2500", "1.20e-04", "1,234", "3.00e+12", "nan"]
