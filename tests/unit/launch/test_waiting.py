"""What is said while a run waits."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trainer.launch import control, waiting
from trainer.launch.platform import JobStatus, Phase
from trainer.launch.waiting import Waiting
from trainer.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(str(tmp_path), "digits", "name: digits\n")


def age(run: RunFolder, seconds: float) -> None:
    for path in run.event_files():
        os.utime(path, times=(time.time() - seconds,) * 2)


def test_a_reason_is_said_once_and_again_after_a_while(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    said, busy = Waiting(run), JobStatus(Phase.PENDING, "Slurm says: Resources")
    assert [said.line(busy) for _ in range(3)] == ["pending: Slurm says: Resources", "", ""]
    assert said.line(JobStatus(Phase.PENDING, "Slurm says: Priority")) == "pending: Slurm says: Priority"
    assert said.line(JobStatus(Phase.UNKNOWN, "nobody answers")) == "unknown: nobody answers"
    assert said.line(JobStatus(Phase.RUNNING, "step 3/9")) == ""
    age(run, 640)
    assert said.line(busy) == "pending for 10 min: Slurm says: Resources"
    monkeypatch.setattr(waiting, "REPEAT_S", 0.0)
    assert said.line(busy) == "pending for 10 min: Slurm says: Resources"
    assert (
        said.line(JobStatus(Phase.RUNNING, "pod-1 waits: no node", waits=True))
        == "waiting for 10 min: pod-1 waits: no node"
    )
    age(run, 7 * 3600 + 9)
    assert said.line(busy).startswith("pending for 7 h: ")
    assert said.line(JobStatus(Phase.PENDING)) == ""


def test_status_tells_the_time_too(run: RunFolder) -> None:
    age(run, 130)
    found = control.status(str(run))
    assert (found["state"], found["waiting"]) == ("pending", "for 2 min")
    assert control.status_text(found) == f"pending for 2 min: {run}"
    run.logs.mkdir(exist_ok=True)
    run.node_log(0).touch()  # something was heard of it
    assert control.status(str(run)).get("waiting", "") == ""


def test_a_run_that_cannot_be_read_does_not_hide_the_others(run: RunFolder, tmp_path: Path) -> None:
    for text in ('{"platform": "mesos"}', '{"platform": "local"}', '{"no": "platform"}'):
        other = RunFolder.create(str(tmp_path), "other", "name: other\n")
        other.handle.write_text(text)
    found = control.list_all(tmp_path)
    assert [item["state"] for item in found if item["run"] != str(run)] == ["unknown"] * 3
    assert all(item["reason"] for item in found if item["run"] != str(run))
    assert f"{run}" in control.list_text(found)
