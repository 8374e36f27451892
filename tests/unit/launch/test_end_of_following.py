"""What `muster run` prints at the end, and what `status` and `list` say of restarts."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from trainer.config.job import Job
from trainer.launch.control import list_all, list_text, status, status_text
from trainer.launch.follow import Lines, end, follow
from trainer.launch.platform import JobStatus, Phase
from trainer.run.folder import RunFolder
from trainer.run.log_tail import EventTail

DONE = JobStatus(Phase.DONE, code=0)
FAILED = JobStatus(Phase.FAILED, code=1)
WRONG = JobStatus(Phase.FAILED, code=64)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that its user's bug stopped twice."""
    run = RunFolder(tmp_path / "cells-1")
    run.logs.mkdir(parents=True)
    run.job.write_text("name: cells\n")
    run.handle.write_text(json.dumps({"platform": "local", "pid": 1, "started": "0"}))
    run.exit.write_text('{"code": 0}')
    run.record("submitted", by="me")
    for attempt in range(3):
        run.record("restart" if attempt else "attempt", attempt=attempt)
        run.record("training", attempt=attempt, step=0, steps=9)
        if attempt < 2:
            run.record("failure", kind="user code", cause="ValueError at bad.py:12", message="ValueError: x")
    return run


RESTARTS = "restarts 2: ValueError at bad.py:12 (2x)"


def test_restarts_are_named_at_the_end_and_afterwards(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    end(run, DONE)
    said = capsys.readouterr()
    assert RESTARTS in said.out and "ontinue with" not in said.out + said.err
    found = status(str(run))
    assert (found["restarts"], RESTARTS in status_text(found)) == (2, True)
    assert RESTARTS in list_text(list_all(run.path.parent))


def test_only_what_can_go_on_is_offered_to_go_on(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.record("ended", node=0, code=64, reason="task='a:B': no module a. Install it")
    end(run, WRONG)
    assert capsys.readouterr().err == f"FAILED: task='a:B': no module a. Install it\n{RESTARTS}\n"
    end(run, FAILED)
    assert f" run {run}" in capsys.readouterr().err.splitlines()[-1]


def test_an_end_without_a_word_shows_the_end_of_the_log(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.node_log(0).write_text("Traceback\nModuleNotFoundError: No module named 'trainer'\n")
    end(run, FAILED)
    assert capsys.readouterr().err.startswith("FAILED: ModuleNotFoundError: No module named 'trainer' (the end of ")


@pytest.mark.parametrize("place", ["events", "output"])
def test_what_cannot_be_shown_ends_nothing(
    run: RunFolder, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who follows a run keeps its supervisor alive: a server that does not answer must not end both."""
    answers = iter([JobStatus(Phase.RUNNING)] * 5 + [DONE])
    looks, errors = [], iter([OSError(errno.ESTALE, "Stale file handle")] * 3)

    def fail(*_: object, **__: object) -> list[dict[str, object]]:
        looks.append(1)
        for error in errors:
            raise error
        return []

    if place == "events":
        monkeypatch.setattr(EventTail, "events", fail)
    else:
        monkeypatch.setattr(Lines, "say", fail)
        monkeypatch.setattr(EventTail, "events", lambda *_, **__: [{"event": "requeued", "time": 1.0}])
        (run.metrics).write_text('{"kind": "foreign"}\n')
    assert follow(run, Job(task="a:B"), lambda: next(answers), lambda: None) == 0
    assert len(looks) >= 4 and capsys.readouterr().err.count("Stale file handle") == 1
