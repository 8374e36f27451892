"""A project of its own, whose code is in no image, on pods that are real containers: what is edited here runs there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from pod_runs import Runs

from trainer.launch import init
from trainer.records import read_json
from trainer.run.folder import RunFolder

pytestmark = pytest.mark.timeout(600)  # the first test of a session may have to build the image


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs) -> Path:
    """As `muster init` writes it, not below this repository."""
    folder = tmp_path / "project"
    folder.mkdir()
    init.init(folder, None)
    monkeypatch.chdir(folder)
    return folder


def edit(project: Path, text: str) -> None:
    """Let the task say something as it is made."""
    path = project / "training.py"
    first = path.read_text().partition("\nprint(")[0]
    path.write_text(f"{first}\nprint({text!r}, flush=True)\n")


def printed(runs: Runs, run: Path) -> str:
    return (runs.claim / run.name / "logs/rank-0.log").read_text()


def test_what_is_edited_here_runs_there_without_a_build(
    runs: Runs, project: Path, record_property: pytest.RecordProperty
) -> None:
    edit(project, "the first line")
    first = runs.submit("train.steps=20", job="job.yaml")
    assert runs.wait(first, "done", "failed")["state"] == "done", runs.printed(first)
    assert "the first line" in printed(runs, first)
    begin = time.monotonic()
    edit(project, "the second line")
    second = runs.submit("train.steps=20", job="job.yaml")
    runs.until(second, lambda: runs.events(second, "first_step"))
    took_s = time.monotonic() - begin
    record_property("edit to first step, s", round(took_s, 2))
    print(f"edit to first step: {took_s:.1f} s, of two pods that are containers")
    assert runs.wait(second, "done", "failed")["state"] == "done", runs.printed(second)
    assert "the second line" in printed(runs, second) and "the first line" not in printed(runs, second)
    hashes = {read_json(RunFolder(run).plan / "code.json")["sha256"] for run in (first, second)}
    assert len(hashes) == 2 and len(runs.pods.steps) == 4
    assert len({text for _, text in runs.pods.steps}) == 2  # the same in the pods of a run
    config = runs.pods.cluster.select("configmaps", {"labelSelector": f"app.kubernetes.io/instance={second.name}"})
    assert len(config) == 2 and "hush" not in json.dumps(config)
