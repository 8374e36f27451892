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
from trainer.run.history import agents_killed
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


HUGE = 10**400
FOREIGN = [
    {"event": "ended"}, {"event": "training"}, {"event": "training", "steps": "x", "step": HUGE},
    {"event": "failure", "cause": 5}, {"event": "checkpoint", "step": HUGE}, {"event": "first_step", "step": [1]},
    {"event": "wired", "node": [1], "launch": "x"}, {"event": "wired", "node": 0, "launch": "x", "platform": 3},
    {"event": "ended", "node": {}, "code": [], "reason": 7}, {"event": "separate_ranks"}, {"event": "agent_lost"},
    {"event": "stopped", "step": "x"}, {"event": "continued"}, {"event": "restart", "attempt": {}}, {"event": "done"},
]  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_of_others_stop_nobody(
    run: RunFolder, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever can write into the folder can write anything."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    answers = iter([JobStatus(Phase.RUNNING)] * 3)

    def ask() -> JobStatus:
        if (now := next(answers, DONE)) is not DONE:
            with (run.events / "launch-foreign.jsonl").open("a") as events, run.metrics.open("a") as metrics:
                for line in FOREIGN:
                    events.write(json.dumps({"time": 2.0, **line}) + "\n")
                    metrics.write(json.dumps({**line, "kind": "train", "loss": HUGE, "time": HUGE}) + "\n")
                    metrics.write(json.dumps({"kind": "evaluation", "samples_per_s": HUGE, "step": "x"}) + "\n")
        return now

    run.evaluation.write_text(json.dumps({"step": [], "accuracy": "high", "loss": HUGE, "f1": 0.5}))
    run.result.write_text('{"metrics": 5}')
    assert follow(run, Job(task="a:B"), ask, lambda: None) == 0
    assert "records cannot be read" in capsys.readouterr().err
    agents_killed(run.read_events())
    found = status(str(run))
    assert found["metrics"] == {"f1": 0.5} and found["state"] == "done"
    assert str(run) in status_text(found) and str(run) in list_text(list_all(run.path.parent))
    run.exit.unlink()
    run.handle.unlink()
    assert status(str(run))["state"] and list_text(list_all(run.path.parent))


@pytest.mark.parametrize("text", ['{"code": [1]}', "{}"])
def test_an_end_that_is_none_of_ours_is_no_end(run: RunFolder, text: str) -> None:
    run.exit.write_text(text)
    assert list_all(run.path.parent)[0]["state"] == status(str(run))["state"] == "lost"
