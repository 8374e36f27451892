"""What an agent that ends badly leaves, and where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from trainer.agent.last_word import judge, leave_for
from trainer.errors import JobError
from trainer.run.folder import RunFolder


def test_what_nobody_expected_is_named_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        {}["key"]
    except KeyError as error:
        code, reason = judge(error)
    assert code == 1
    assert "KeyError: 'key' (test_last_word.py:" in reason and "the agent on " in reason
    assert "Traceback" in capsys.readouterr().err


def test_a_wrong_job_is_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = JobError("task", "a:B", "no module a", "Install it")
    assert judge(error) == (64, "task='a:B': no module a. Install it")
    assert capsys.readouterr().err == ""


def test_it_reaches_the_run_and_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.record("submitted", by="me")
    monkeypatch.setenv("MUSTER_RUN", str(run))
    monkeypatch.setenv("MUSTER_TERMINATION_LOG", str(tmp_path / "message"))
    leave_for("/elsewhere/job.yaml", 64, "so it is")
    assert [event["reason"] for event in run.read_events() if event["event"] == "ended"] == ["so it is"]
    assert (tmp_path / "message").read_text() == "so it is"
    monkeypatch.setenv("MUSTER_RUN", str(tmp_path / "not there"))
    leave_for("/elsewhere/job.yaml", 64, "again")
    assert (tmp_path / "message").read_text() == "again"
    monkeypatch.delenv("MUSTER_RUN")
    leave_for(str(tmp_path / "no folder/job.yaml"), 64, "without a run")
    assert (tmp_path / "message").read_text() == "without a run"
    (tmp_path / "sweep.json").write_text('{"runs": []}')
    leave_for(str(tmp_path), 64, "no task of this sweep")
    assert (tmp_path / "message").read_text() == "no task of this sweep"


def test_an_agent_that_cannot_begin_tells_its_run_why(tmp_path: Path) -> None:
    """Here the module of the task is not there, as in an image; a question alone leaves no word."""
    run = RunFolder(tmp_path)
    run.record("submitted", by="me")
    run.job.write_text("task: not_in_the_image:Task\n")
    for words in (["--explain"], []):
        command = [sys.executable, "-m", "trainer", str(run.job), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 64
        ended = [event["reason"] for event in run.read_events() if event["event"] == "ended"]
        assert [said in done.stderr for said in ended] == ([] if words else [True])
        assert len(ended) == (not words)
