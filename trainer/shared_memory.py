"""Shared memory that a killed loader worker leaves: torch makes a file for a batch, and unlinks it a moment later."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from trainer.heartbeat import VARIABLE

SHM = Path("/dev/shm")


def note_worker() -> None:
    """In a worker: tell the agent, if there is one, which process this is. Its rank may die without a word."""
    heartbeat = os.environ.get(VARIABLE)
    if heartbeat:
        with contextlib.suppress(OSError):
            Path(heartbeat).with_name(f"worker-{os.getpid()}").touch()


def remove_leftovers(folder: Path, shm: Path = SHM) -> None:
    """Remove what the workers noted in an agent's folder, all of which were killed, left between making and unlinking.

    One that is still on its way out is looked at again the next time.
    """
    for note in folder.glob("worker-*"):
        pid = note.name.partition("-")[2]
        ended = not Path("/proc", pid).exists()
        for left in shm.glob(f"torch_{pid}_*"):
            left.unlink(missing_ok=True)
        if ended:
            note.unlink(missing_ok=True)
