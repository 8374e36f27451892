"""What is told of all attempts of a run: how often and why it was restarted, how long it took, why it ended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.records import write_json
from trainer.run.folder import RunFolder
from trainer.run.history import agents_killed, likely_end, restarts_text, training_times, why_ended
from trainer.run.summary import plain_table


def events(*names: str | tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Events, a second apart."""
    pairs = [name if isinstance(name, tuple) else (name, {}) for name in names]
    return [{"event": name, "time": 100.0 + number, **fields} for number, (name, fields) in enumerate(pairs)]


BUG = ("failure", {"kind": "user code", "cause": "ValueError at cells/bad.py:12"})
KILLED = ("failure", {"kind": "killed", "cause": ""})
LOST = ("failure", {"kind": "peer lost"})
OLD = ("failure", {"kind": "hung"})
WIRED = ("wired", {"node": 0, "launch": 0})
AGAIN = ("wired", {"node": 0, "launch": 1})


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["submitted", WIRED, "attempt", "training", "done"], ""),
        (["attempt", *[BUG, "restart"] * 7, "done"], "7: ValueError at cells/bad.py:12 (7x)"),
        (["attempt", KILLED, "restart", BUG, "restart", BUG, "restart"],
         "3: ValueError at cells/bad.py:12 (2x), killed (1x)"),
        (["attempt", OLD, "restart"], "1: hung (1x)"),
        (["attempt", BUG, "ended", "continued", WIRED, "attempt", "done"], ""),
        (["attempt", "agent_lost", WIRED, "attempt"], "1: agent lost (1x)"),
        (["attempt", "agent_lost", LOST, "restart"], "1: agent lost (1x)"),
        (["attempt", "stopped", "requeued", AGAIN, "attempt"], "1: requeued (1x)"),
        (["attempt", "stopped", AGAIN, "attempt"], "1: requeued (1x)"),
        (["attempt", BUG, "requeued", AGAIN, "attempt"], "1: ValueError at cells/bad.py:12 (1x)"),
    ],
    ids=["calm", "a bug", "several", "an old run", "continued", "agent", "agent of two", "local requeue", "by Slurm",
         "after a bug"],
)  # fmt: skip
def test_restarts_are_counted_by_cause(names: list[Any], text: str) -> None:
    assert restarts_text(events(*names)) == text


def test_times_are_those_of_all_attempts() -> None:
    told = events("attempt", "training", "first_step", BUG, "restart", "training", "checkpoint", "done", "ended")
    assert training_times(told) == [2.0, 2.0]
    killed = events("training", "checkpoint", "continued", "attempt", "training", "done")
    killed[2]["time"] += 86400  # the machine was off for a day
    assert training_times(killed[:3]) == [1.0]
    assert training_times(events("training", "first_step")) == []


def make_run(folder: Path, *names: str | tuple[str, dict[str, Any]]) -> RunFolder:
    (folder / "logs").mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events(*names)))
    return RunFolder(folder)


def test_the_table_of_a_run_that_was_restarted(tmp_path: Path) -> None:
    run = make_run(tmp_path, "attempt", "training", BUG, "restart", "training", "first_step", "done")
    write_json(run.result, {
        "metrics": {"accuracy": 0.9}, "steps": 180, "samples_per_s": 0.0, "train_s": 0.04, "device": "cpu",
        "world_size": 2, "parallel": "ddp", "peak_memory_mb": [],
    })  # fmt: skip
    lines = [{"kind": "train", "step": step, "samples_per_s": speed} for step, speed in ((10, 100.0), (20, 300.0))]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = dict(line.split("  ", 1) for line in plain_table(run).splitlines())
    rows = {name.strip(): value.strip() for name, value in table.items()}
    assert rows["time"] == "3.0 s for 180 steps in 2 attempts"
    assert rows["samples/s"] == "150"
    assert rows["restarts"] == "1: ValueError at cells/bad.py:12 (1x)"
    assert "continue with" not in rows


def said(reason: str, code: int = 1, node: int = 0) -> tuple[str, dict[str, Any]]:
    return "ended", {"node": node, "code": code, "reason": reason}


def test_the_reason_is_the_one_that_explains_the_others(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert why_ended(run, events("submitted", said("a"), said("b"))) == "b"
    assert why_ended(run, events("submitted", said("the job is wrong", 64, 1), said("lost"))) == "the job is wrong"
    assert why_ended(run, events("submitted", said("why"), said("stopped", 75, 1))) == "why"
    assert why_ended(run, events("submitted", said("before"), "continued")) == ""
    write_json(run.failure, {"reason": "the paragraph", "code": 1})
    assert why_ended(run, events("submitted", said("b"))) == "the paragraph"
    assert why_ended(run, events("submitted", said("the job is wrong", 64, 1))) == "the job is wrong"


def test_where_nobody_said_why_the_end_of_a_log_does(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert likely_end(run, events("submitted")) == ""
    log = run.node_log(0)
    log.write_text("ERROR: task='a:B': no module a. Install it\nbye\n\n")
    assert likely_end(run, events("submitted")) == f"task='a:B': no module a. Install it (the end of {log})"
    log.write_text("Traceback ...\nModuleNotFoundError: No module named 'trainer'\n")
    assert likely_end(run, events("submitted")).startswith("ModuleNotFoundError: No module named 'trainer' (")
    os.utime(log, (50, 50))  # of an earlier launch
    assert likely_end(run, events("submitted")) == ""
    lost = ("agent_lost", {"node": 1, "code": -9})
    assert likely_end(run, events("submitted", lost)).startswith("the agent of node 1 was lost (ended by signal 9)")
    assert likely_end(run, events("submitted", lost, ("wired", {"node": 0}))).startswith("the agent of node 1")
    assert likely_end(run, events("submitted", lost, ("wired", {"node": 1}))) == "", "another one took its place"


def test_agents_that_were_killed_are_counted_since_the_last_checkpoint() -> None:
    other, stopped = ("wired", {"node": 1}), ("ended", {"node": 1, "code": 75})
    assert agents_killed(events("submitted", WIRED, other, "attempt")) == (0, 0)
    assert agents_killed(events(WIRED, other, other, other, WIRED)) == (2, 1)
    assert agents_killed(events(WIRED, other, other, "checkpoint", other)) == (1, 1)
    assert agents_killed(events(WIRED, other, stopped, other)) == (0, 0)
    assert agents_killed(events(WIRED, other, "done", WIRED, other)) == (0, 0)
    assert agents_killed(events(WIRED, other, other, "continued", WIRED, other)) == (0, 0)
