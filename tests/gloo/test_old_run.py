"""Run folders that an earlier version made: they are still read, and their training still goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from muster_runs import Run, muster
from paths import ROOT
from ranks import evaluations

from trainer.records import read_lines

OLD = ROOT / "tests/fixtures/run-of-9173f8d"
"""The digits with two ranks, weight averages and recorded samples, stopped at step 30 by `train.steps=30`."""
LOSSES = {31: 2.1567993, 32: 2.1404653, 38: 2.1124935, 45: 2.0402188}
EVALUATION = {"step": 45, "loss": 2.1416849, "accuracy": 0.3732591}
"""With what the version that made the folder went on to step 45."""


@pytest.fixture
def old(tmp_path: Path) -> Run:
    """A copy of the folder."""
    copy = Run(shutil.copytree(OLD, tmp_path / "runs/digits-1127-232243-a026"))
    for path in (copy.folder, *copy.folder.rglob("*")):  # a checkout may be writable by a group
        path.chmod(path.stat().st_mode & ~0o022)
    return copy


def test_it_is_shown(old: Run) -> None:
    status = old.status()
    assert (status["state"], status["code"], status["step"], status["steps"]) == ("done", 0, 30, 30)
    assert json.loads(muster("list", old.folder.parent, "--json").stdout) == [status]
    assert "step 30 of 30" in muster("status", old.folder).stdout
    assert "step 30/30" in muster("logs", old.folder).stdout


def test_it_goes_on_as_if_nothing_had_changed(old: Run) -> None:
    """Weights, optimizer, averages, schedule and order of samples: one of them lost, and the losses differ."""
    done = muster("run", old.folder, "train.steps=45", "log.every_steps=1", cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["step"] for event in old.events("training")] == [0, 30]
    lines = read_lines(old.folder / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train" and line["step"] in LOSSES}
    assert losses == pytest.approx(LOSSES, rel=1e-4)
    assert evaluations(old.folder)[-1] == pytest.approx(EVALUATION, rel=1e-3)
