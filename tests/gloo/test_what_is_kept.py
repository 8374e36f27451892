"""What a run leaves in its folder: nothing that others may write, and no value of a variable that the job names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from muster_runs import muster

TASK = """
import os
from trainer.tasks.digits import Digits

class Locked(Digits):
    def __init__(self, token, more=""):
        super().__init__()
        assert token == os.environ["TOKEN"]
        if more:
            raise TypeError(f"no such thing as {more}")
"""
JOB = """
task: locked_task:Locked
task_args: {token: "${oc.env:TOKEN}"}
parallel: single
device: cpu
train: {steps: 2}
"""
TOKEN = "a-long-secret'with\"quotes\\and-more-" + "x" * 120


def leaks(*texts: str, folder: Path) -> list[str]:
    """Where a part of the secret is that nothing else contains."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [str(path) for path in files if b"a-long-secret" in path.read_bytes()]
    return found + [text for text in texts if "a-long-secret" in text]


def test_a_run_keeps_no_secret_and_nothing_for_others_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask is; with the variable set again it goes on, and without it says so."""
    (tmp_path / "locked_task.py").write_text(TASK)
    job, runs = tmp_path / "locked.yaml", tmp_path / "runs"
    job.write_text(JOB)
    monkeypatch.setenv("TOKEN", TOKEN)
    before = os.umask(0)
    try:
        done = muster("run", job, f"runs={runs}", cwd=tmp_path)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = runs.glob("locked-*")
    open_to_others = [path for path in [runs, *runs.rglob("*")] if path.lstat().st_mode & 0o022]
    assert [path for path in open_to_others if not path.is_symlink() and not path.is_socket()] == []
    rendered = muster("render", job, "--on", "docker", cwd=tmp_path)
    refused = [
        muster("run", job, f"runs={runs}", word, cwd=tmp_path)
        for word in ("task_args.wrong=${oc.env:TOKEN}", "train.lr=${oc.env:TOKEN}", "train.precision=${oc.env:TOKEN}",
                     "task_args.more=${oc.env:TOKEN}")
    ]  # fmt: skip
    said = [text for each in [done, rendered, *refused] for text in (each.stdout, each.stderr)]
    assert [each.returncode for each in refused] == [64] * 4, said
    assert all("${oc.env:TOKEN}" in each.stderr for each in refused), said
    assert leaks(*said, folder=tmp_path) == []
    assert muster("run", run, "train.steps=4", cwd=tmp_path).returncode == 0
    monkeypatch.delenv("TOKEN")
    lost = muster("run", run, "train.steps=6", cwd=tmp_path)
    assert lost.returncode == 64
    assert "the variable TOKEN is not set. Set TOKEN where the job runs" in lost.stderr
