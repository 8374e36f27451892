"""Memory that outlives a killed rank: the agent of a node owns it, its ranks and their successors map it.

It is gone when the agent is gone, however the agent ends (memfd_create(2)). `trainer.checkpoint.handover` decides
what ranks keep there, `trainer.agent.agent` asks them for it. Never imports torch.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from trainer.config.job import Job

VARIABLE = "MUSTER_MEMORY"
ASK = signal.SIGRTMIN + 7
"""Makes a rank hand over its state: a thread of it waits for this signal, so the main thread may be stuck."""
SILENT, BUSY, ANSWERED = range(3)
NOTE = struct.Struct("<qqq")
"""Attempt, step, bytes; written last. Step -1: not whole."""
NOTES = 3
"""Steps whose buffers are remembered: survivors may be one behind or ahead of the first rank when it dies."""
NOTE_BYTES, NOTE_HEAD = 2 << 20, 64
"""Of a note, and of what stands before its contents. Only what is written takes memory."""
ANSWERS = NOTES * NOTE_BYTES
"""Where the answers of the ranks begin, a byte each."""
ROOM = NOTE_BYTES - NOTE_HEAD
"""Bytes that a note can hold."""
STATE = struct.Struct("<qq32s")
"""Attempt, moment and sha256 of the state that was handed over; written last."""
NO_STATE = (-1, -1)
PATIENCE_S, WRITE_S = 0.5, 30.0
"""For a rank to answer that it was asked, and to have written its state."""


def keeps_state(job: Job) -> bool:
    """Whether ranks of this job can take over from each other: see `trainer.checkpoint.handover`."""
    several = job.nodes * job.devices_per_node > 1
    return bool(job.task) and job.checkpoint.in_memory and job.parallel == "ddp" and several and job.ddp.sync_every == 1


class Memory:
    """The memory of one node, from either side."""

    def __init__(self, notes: str, state: str) -> None:
        """The paths of its two files, which the agent holds open."""
        self.paths, self.state = (notes, state), Path(state)
        with Path(notes).open("r+b") as file:
            self.notes = mmap.mmap(file.fileno(), 0)

    @classmethod
    def make(cls, ranks: int) -> "Memory":
        """The agent's: empty."""
        notes, state = os.memfd_create("muster-notes"), os.memfd_create("muster-state")
        os.ftruncate(notes, ANSWERS + ranks)
        return cls(*(f"/proc/{os.getpid()}/fd/{handle}" for handle in (notes, state)))

    @classmethod
    def find(cls) -> "Memory | None":
        """A rank's, through the environment; None without an agent that keeps some."""
        paths = os.environ.get(VARIABLE, "").split()
        try:
            return cls(*paths) if paths else None
        except OSError:  # hardened against looking into other processes: the checkpoints on disk are left
            return None

    def environment(self) -> dict[str, str]:
        """What lets ranks find it."""
        return {VARIABLE: " ".join(self.paths)}

    def answer(self, local_rank: int, value: int) -> None:
        """Say what became of the question."""
        self.notes[ANSWERS + local_rank] = value

    def ask(self, processes: Sequence[tuple[int, Any]]) -> None:
        """Let living ranks, (local rank, process), hand over what they have; return when they have, or cannot."""
        for _, process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, ASK)
        began = time.monotonic()
        while True:
            answers = [self.notes[ANSWERS + rank] for rank, process in processes if process.exitcode is None]
            patience = WRITE_S if BUSY in answers else PATIENCE_S
            if all(answer == ANSWERED for answer in answers) or time.monotonic() > began + patience:
                return
            time.sleep(0.002)

    def note_offset(self, step: int) -> int:
        """Where the note of a step begins."""
        return step % NOTES * NOTE_BYTES

    def read_notes(self) -> dict[tuple[int, int], bytes]:
        """Whole notes by (attempt, step)."""
        notes = {}
        for index in range(NOTES):
            offset = self.note_offset(index)
            attempt, step, size = NOTE.unpack_from(self.notes, offset)
            if size and step >= 0:
                notes[attempt, step] = self.notes[offset + NOTE_HEAD : offset + NOTE_HEAD + size]
        return notes

    def write_state(self, key: tuple[int, int], write: Callable[[BinaryIO], bytes]) -> None:
        """Let `write` put a state into its file and return its sha256, unless another rank left as new a one."""
        with self.state.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if self._key() >= key:
                return
            file.write(STATE.pack(*NO_STATE, b""))
            file.flush()
            digest = write(file)
            file.truncate()
            file.seek(0)
            file.write(STATE.pack(*key, digest))

    def _key(self) -> tuple[int, int]:
        with self.state.open("rb") as file:
            attempt, moment, _ = STATE.unpack(file.read(STATE.size) or STATE.pack(*NO_STATE, b""))
        return attempt, moment

    @property
    def step(self) -> int:
        """Steps done in the state that was handed over, -1 when there is none."""
        return self._key()[1] // 2

    def read_state(self) -> tuple[tuple[int, int], bytes] | None:
        """(attempt, moment) and bytes of the state that was handed over, verified; None without a whole one."""
        data = self.state.read_bytes()
        if not data:
            return None
        attempt, moment, digest = STATE.unpack_from(data)
        contents = data[STATE.size :]
        return ((attempt, moment), contents) if hashlib.sha256(contents).digest() == digest else None

    def clear_state(self) -> None:
        """Give the memory of the state back."""
        os.truncate(self.state, 0)
