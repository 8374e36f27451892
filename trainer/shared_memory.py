"""Shared memory that a killed loader worker leaves: torch makes a file for a batch, and unlinks it a moment later."""

from __future__ import annotations

import contextlib
import fcntl
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

    One that is still on its way out is looked at again the next time. Files carry the process id of their maker, and
    containers that share memory do not share process ids: what any process has open, or mapped, is left alone.
    """
    for note in folder.glob("worker-*"):
        pid = note.name.partition("-")[2]
        ended = not Path("/proc", pid).exists()
        for left in shm.glob(f"torch_{pid}_*"):
            with contextlib.suppress(OSError), left.open("r+b") as file:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # refused while another has it open: fcntl(2)
                left.unlink()
        if ended:
            note.unlink(missing_ok=True)
