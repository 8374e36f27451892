"""The head start of `muster run`: an agent imports torch while the job is still being read."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from muster_runs import HERE, MUSTER, environment, processes_of, wait_for

SOON_S = 3.0


@pytest.fixture
def mark() -> Iterator[str]:
    """A word in the environment of all that a command starts; whatever is left of that at the end is killed."""
    word = uuid.uuid4().hex
    yield word
    for pid in processes_of(word):
        os.kill(pid, signal.SIGKILL)


def start(mark: str, *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [MUSTER, "run", *map(str, words)], cwd=HERE, env=environment(MARK=mark), text=True, stderr=subprocess.PIPE
    )


def has_torch(pid: int) -> bool:
    """Whether a process has loaded torch."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_a_refused_job_leaves_nothing(mark: str, tmp_path: Path) -> None:
    process = start(mark, "faulty.yaml", f"runs={tmp_path}", "train.stepz=5")
    _, said = process.communicate(timeout=SOON_S)
    assert process.returncode == 64
    assert said.startswith("ERROR: train.stepz=5: ") and len(said.splitlines()) == 1
    wait_for("the end of what was started", lambda: not processes_of(mark), SOON_S)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_torch_is_imported_before_the_job_is_read_and_all_ends_with_the_command(
    mark: str, tmp_path: Path, number: signal.Signals
) -> None:
    job = tmp_path / "job.yaml"
    os.mkfifo(job)  # reading it waits for ever
    process = start(mark, job)
    wait_for("torch", lambda: any(map(has_torch, processes_of(mark))), 20)
    process.send_signal(number)
    process.communicate(timeout=SOON_S)
    assert process.returncode
    wait_for("the end of what was started", lambda: not processes_of(mark), SOON_S)
