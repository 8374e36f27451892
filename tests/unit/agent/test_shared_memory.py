"""Only what killed loader workers left in shared memory is removed."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

import pytest

from trainer.agent.shared_memory import SHM, note_worker, remove_leftovers
from trainer.reporting.heartbeat import VARIABLE


def test_what_dead_workers_left_is_removed_and_what_others_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / f"worker-{process.pid}").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "heartbeat"))
    note_worker()
    left, used, other = (SHM / f"torch_{pid}_7_{os.getpid()}" for pid in (process.pid, os.getpid(), f"{process.pid}0"))
    try:
        for path in (left, used, other):
            path.write_bytes(b"batch")
        with used.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        remove_leftovers(tmp_path)
        assert [path.exists() for path in (left, used, other)] == [False, True, True]
        assert [path.name for path in tmp_path.iterdir()] == [f"worker-{os.getpid()}"], "it lives, and is asked again"
        mapped.close()
        remove_leftovers(tmp_path)
        assert not used.exists()
    finally:
        for path in (left, used, other):
            path.unlink(missing_ok=True)


def test_a_worker_without_an_agent_notes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    note_worker()
    assert list(tmp_path.iterdir()) == []
