"""`muster status` and `muster list` of runs that have been going on for long: they read the ends of files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trainer.launch import control
from trainer.records import append_line
from trainer.run import event_files
from trainer.run.folder import RunFolder

TRAIN = {"kind": "train", "attempt": 7, "time": 1.5, "loss": 0.5, "mean_loss": 0.5, "lr": 0.1, "samples_per_s": 100.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Forty MB of metrics and samples, many restarts, and nodes that said much."""
    monkeypatch.setattr(event_files, "_nodes", [])
    run = RunFolder.create(str(tmp_path), "long", "name: long\n")
    monkeypatch.setattr(event_files, "_nodes", [0])
    for attempt in range(8):
        run.record("restart" if attempt else "attempt", attempt=attempt, round=attempt + 1)
        run.record("training", attempt=attempt, step=0, steps=10**6)
        if attempt < 7:
            run.record("failure", node=0, kind="killed", cause="", message="x" * 500)
    block = "".join(json.dumps({"step": step, **TRAIN}) + "\n" for step in range(1, 1001))
    with run.metrics.open("w") as file:
        for _ in range(250):
            file.write(block)
        file.write(json.dumps({"kind": "train", "step": 123456, "attempt": 7, "time": 1.0, "loss": 1.0}) + "\n")
    append_line(run.metrics, {"kind": "train", "step": 999999, "attempt": 3, "time": 1e10})  # a stale attempt's
    run.evaluation.write_text(json.dumps({"step": 5, "attempt": 2, "accuracy": 0.75}))
    run.samples(0).write_text(block * 10)
    run.rank_log(0).write_text("x" * 10_000_000)
    for node in range(1, 4):
        other = run.events / f"node-{node}-host.jsonl"
        other.write_text(json.dumps({"time": 1.0, "event": "hung", "rank": node}) * 20_000 + "\n")
    return run


def bytes_read() -> int:
    """By this process so far (proc(5)); the kernel counts what was asked for, from memory too."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["rchar"])


def test_the_ends_of_files_tell_all(run: RunFolder) -> None:
    assert run.metrics.stat().st_size > 30_000_000
    before = bytes_read()
    found = control.status(str(run))
    spent = bytes_read() - before
    assert (found["step"], found["steps"], found["attempt"]) == (123456, 10**6, 7)
    assert found["metrics"] == {"accuracy": 0.75}
    assert found["restarts_text"] == "7: killed (7x)"
    assert spent < 2_000_000, "however long the run"
    before = bytes_read()
    assert [item["step"] for item in control.list_all(run.path.parent)] == [123456]
    assert bytes_read() - before < 2_000_000


def test_a_run_that_failed_is_explained_from_all_nodes(run: RunFolder) -> None:
    """Their files are read from the end, too."""
    (run.events / "node-2-host.jsonl").open("a").write(
        "\n" + json.dumps({"time": 2e9, "event": "ended", "node": 2, "code": 1, "reason": "so it was"}) + "\n"
    )
    before = bytes_read()
    found = control.status(str(run))
    assert (found["state"], found["reason"]) == ("failed", "so it was")
    assert bytes_read() - before < 2_000_000


def test_an_old_run_has_its_evaluation_among_its_metrics(run: RunFolder) -> None:
    os.unlink(run.evaluation)
    append_line(run.metrics, {"kind": "evaluation", "step": 6, "attempt": 7, "time": 2.0, "accuracy": 0.5})
    assert control.status(str(run))["metrics"] == {"accuracy": 0.5}
