"""A job file that a node sees late is waited for, where a platform started the agent."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from trainer.agent import late_files
from trainer.agent.late_files import await_job
from trainer.signals import FLAG


@pytest.fixture
def on_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(late_files, "LATE_S", 5.0)


def appear(folder: Path) -> None:
    (folder / "code").mkdir(parents=True)
    (folder / "job.yaml").write_text("name: digits\n")


def test_it_is_waited_for(tmp_path: Path, on_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    timer = threading.Timer(0.7, appear, [tmp_path / "runs/digits-1"])
    timer.start()
    path = tmp_path / "runs/digits-1/job.yaml"
    assert await_job(path) == path and path.exists()
    assert capsys.readouterr().err.count(f"waiting for {path}") == 1


def test_a_job_that_slurm_started_in_tmp_goes_where_its_code_is(
    tmp_path: Path, on_slurm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """slurmd says "couldn't chdir ... going to /tmp instead" when it does not see the folder yet."""
    appear(tmp_path)
    monkeypatch.chdir("/tmp")
    await_job(tmp_path / "job.yaml")
    assert Path.cwd() == tmp_path / "code"


def test_code_is_looked_for_from_tmp_alone(tmp_path: Path, on_slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    appear(tmp_path)
    monkeypatch.chdir(tmp_path)
    await_job(tmp_path / "job.yaml")
    assert Path.cwd() == tmp_path


def test_a_stop_request_ends_the_wait(tmp_path: Path, on_slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_files, "LATE_S", 30.0)
    monkeypatch.setattr(FLAG, "requested", "SIGTERM")
    began = time.monotonic()
    await_job(tmp_path / "job.yaml")
    assert time.monotonic() - began < 20


def test_what_a_person_typed_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MUSTER_"))]:
        monkeypatch.delenv(name)
    await_job(tmp_path / "job.yaml")
    monkeypatch.setenv("MUSTER_PLATFORM", "local")
    await_job(Path("jobs/no such.yaml"))
    assert capsys.readouterr().err == ""
