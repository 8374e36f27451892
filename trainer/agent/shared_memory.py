"""Shared memory that a killed loader worker leaves: torch makes a file for a batch, and unlinks it a moment later."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from pathlib import Path

from trainer.reporting.heartbeat import VARIABLE

SHM = Path("/dev/shm")


def note_worker() -> None:
    """In a worker: tell the agent, if there is one, which process this is. Its rank may die without a word."""
    heartbeat = os.environ.get(VARIABLE)
    if heartbeat:
        with contextlib.suppress(OSError):
            Path(heartbeat).with_name(f"worker-{os.getpid()}").touch()


def remove_leftovers(folder: Path) -> None:
    """Remove what the workers noted in an agent's folder, all of which were killed, left between making and unlinking.

    One that is still on its way out is looked at again the next time. Files carry the process id of their maker, and
    containers that share memory do not share process ids: what any process has open, or mapped, is left alone.
    """
    notes = {note.name.partition("-")[2]: note for note in folder.glob("worker-*")}
    ended = [note for pid, note in notes.items() if not Path("/proc", pid).exists()]
    for left in SHM.glob("torch_*_*") if notes else ():
        if left.name.split("_")[1] in notes:
            with contextlib.suppress(OSError), left.open("r+b") as file:
                fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # ignored, where a lease's own signal would end us
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # refused while another has it open: fcntl(2)
                left.unlink()
    for note in ended:
        note.unlink(missing_ok=True)
