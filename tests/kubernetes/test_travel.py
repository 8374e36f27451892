"""A project of its own, whose code is in no image, on pods that are real containers: what is edited here runs there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pod_runs import Runs
from stopwatch import Stopwatch

from trainer.checkpoint.files import verify
from trainer.launch import control, init
from trainer.records import read_json
from trainer.run.folder import RunFolder, committed
from trainer.run.progress import last_evaluation

MUSTER = Path(sys.executable).with_name("muster")

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
    _pull(runs, second)


def _pull(runs: Runs, run: Path) -> None:
    """Results come home through a pod that lives as long as that takes; a transfer that is killed goes on later."""
    far, here = RunFolder(runs.claim / run.name), RunFolder(run)
    large = far.path / "tensorboard/large"
    large.write_bytes(random.Random(0).randbytes(48 << 20))
    pulling = subprocess.Popen([MUSTER, "pull", run, "--checkpoints", "last"], start_new_session=True)
    pending = here.pull / "tensorboard/large"
    runs.until(run, lambda: (pending.exists() and pending.stat().st_size > 1 << 20) or pulling.poll() is not None)
    assert pulling.poll() is None
    os.killpg(pulling.pid, signal.SIGKILL)
    pulling.wait()
    begun = pending.stat().st_size
    assert not (here.path / "tensorboard/large").exists() and begun < 48 << 20
    said = subprocess.run([MUSTER, "pull", run, "--checkpoints", "last"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "tensorboard" in said.stdout and "checkpoints/step-000000020" in said.stdout
    names = ["metrics.jsonl", "result.json", "logs/rank-1.log", "tensorboard/large"]
    names += [str(path.relative_to(far.path)) for path in (*far.events.iterdir(), *large.parent.iterdir())]
    for name in names:
        assert (here.path / name).read_bytes() == (far.path / name).read_bytes(), name
    [checkpoint] = committed(here.checkpoints)
    verify(checkpoint)
    assert not here.pull.exists() and not here.result.is_symlink()
    found = control.status(str(run))
    assert (found["state"], found["step"], found["steps"]) == ("done", 20, 20)
    assert found["metrics"] == last_evaluation(far)
    runs.until(run, lambda: not any(name.endswith("-files") for _, name in list(runs.pods.cluster.objects)))


def test_a_large_tree_goes_through_the_claim(runs: Runs, project: Path, stopwatch: Stopwatch) -> None:
    """The same in every pod; what was changed there meanwhile is refused; what is there already is not sent again."""
    edit(project, "a large tree")
    (project / "table.txt").write_bytes(random.Random(0).randbytes(30 << 20))
    subprocess.run(["git", "init", "--quiet", project], check=True)
    with stopwatch.at_most(30):
        first = runs.submit("train.steps=20", job="job.yaml")
    assert runs.wait(first, "done", "failed")["state"] == "done", runs.printed(first)
    assert "a large tree" in printed(runs, first)
    assert len(runs.pods.steps) == 2 and len({text for _, text in runs.pods.steps}) == 1
    archive = RunFolder(runs.claim / first.name).code_archive
    assert archive.stat().st_size > 30 << 20 and archive.stat().st_uid == 10001
    inode = archive.stat().st_ino
    runs.pods.hold = True
    second = runs.submit("train.steps=20", job="job.yaml")
    copy = RunFolder(runs.claim / second.name).code_archive
    assert copy.stat().st_ino == inode
    content = bytearray(copy.read_bytes())
    content[1 << 20] ^= 1
    copy.unlink()
    copy.write_bytes(content)
    runs.pods.hold = False
    found = runs.wait(second, "failed", "done")
    assert (found["state"], found["code"]) == ("failed", 64), found
    assert "is not what was submitted" in found["reason"]
    runs.until(second, lambda: not any(name.endswith("-files") for _, name in list(runs.pods.cluster.objects)))
    assert list(runs.claim.rglob("*.tar.gz.*")) == []
