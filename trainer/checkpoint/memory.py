"""Memory that outlives a killed rank: the agent of a node owns it, its ranks and their successors map it.

It is gone when the agent is gone, however the agent ends (memfd_create(2)). `trainer.checkpoint.handover` decides
what ranks keep there, `trainer.agent.agent` asks them for it. Never imports torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from trainer.config.job import Job

VARIABLE = "MUSTER_MEMORY"
ASK = signal.SIGRTMIN + 7
"""Makes a rank hand over its state: a thread of it waits for this signal, so the main thread may be stuck."""
ANSWER = struct.Struct("<q")
SILENT, BUSY, ANSWERED = range(3)
NOTE = struct.Struct("<qqq")
"""Attempt, step, bytes; written last. Step -1: not whole."""
NOTES = 3
"""Steps whose buffers are remembered: survivors may be one behind or ahead of the first rank when it dies."""
NOTE_BYTES, NOTE_HEAD = 2 << 20, 64
"""Of a note, and of what stands before its contents. Only what is written takes memory."""
ANSWERS = NOTES * NOTE_BYTES
"""Where the answers of the ranks begin."""
ROOM = NOTE_BYTES - NOTE_HEAD
"""Bytes that a note can hold."""
STATE = struct.Struct("<qqq32s")
"""Attempt, moment, bytes, sha256 of the state that was handed over; written last. 0 bytes: not whole."""
PATIENCE_S, WRITE_S = 0.5, 30.0
"""For a rank to answer that it was asked, and to have written its state."""


def keeps_state(job: Job) -> bool:
    """Whether ranks of this job can take over from each other: see `trainer.checkpoint.handover`."""
    several = job.nodes * job.devices_per_node > 1
    return bool(job.task) and job.checkpoint.in_memory and job.parallel == "ddp" and several and job.ddp.sync_every == 1


class Memory:
    """The memory of one node, from either side."""

    def __init__(self, notes: int | str, state: int | str) -> None:
        """Open files of the agent, or the paths under which its ranks find them."""
        self.paths = (notes, state)
        handle = os.open(notes, os.O_RDWR) if isinstance(notes, str) else notes
        self.notes = mmap.mmap(handle, 0)
        if isinstance(notes, str):
            os.close(handle)

    @classmethod
    def make(cls, ranks: int) -> Memory:
        """The agent's: empty."""
        notes = os.memfd_create("muster-notes")
        os.ftruncate(notes, ANSWERS + ranks * ANSWER.size)
        return cls(notes, os.memfd_create("muster-state"))

    @classmethod
    def find(cls) -> Memory | None:
        """A rank's, through the environment; None without an agent that keeps some."""
        names = os.environ.get(VARIABLE, "").split()
        try:
            return cls(*names) if names else None
        except OSError:  # hardened against looking into other processes: the checkpoints on disk are left
            return None

    def environment(self) -> dict[str, str]:
        """What lets ranks find it."""
        return {VARIABLE: " ".join(f"/proc/{os.getpid()}/fd/{handle}" for handle in self.paths)}

    def forget_answers(self, ranks: int) -> None:
        """New ranks start, which nobody has asked yet."""
        for local_rank in range(ranks):
            self.answer(local_rank, SILENT)

    def answer(self, local_rank: int, value: int) -> None:
        """Say what became of the question."""
        ANSWER.pack_into(self.notes, ANSWERS + local_rank * ANSWER.size, value)

    def ask(self, processes: Sequence[tuple[int, Any]]) -> None:
        """Let living ranks, (local rank, process), hand over what they have; return when they have, or cannot."""
        for _, process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, ASK)
        began = time.monotonic()
        while True:
            waiting = [
                rank for rank, process in processes if self._answer(rank) < ANSWERED and process.exitcode is None
            ]
            busy = any(self._answer(rank) == BUSY for rank in waiting)
            if not waiting or time.monotonic() > began + (WRITE_S if busy else PATIENCE_S):
                return
            time.sleep(0.002)

    def _answer(self, local_rank: int) -> int:
        [value] = ANSWER.unpack_from(self.notes, ANSWERS + local_rank * ANSWER.size)
        return int(value)

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

    @contextlib.contextmanager
    def newer(self, key: tuple[int, int]) -> Iterator[BinaryIO | None]:
        """The file to write a state to, unless another rank of the node has handed over as new a one; locked."""
        with self._open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if self._key(file) >= key:
                yield None
                return
            file.seek(0)
            file.write(bytes(STATE.size))  # not whole until `seal`
            file.flush()
            yield file

    def seal(self, file: BinaryIO, key: tuple[int, int], size: int, digest: bytes) -> None:
        """Make the state that was written valid."""
        file.truncate(STATE.size + size)
        file.seek(0)
        file.write(STATE.pack(*key, size, digest))
        file.flush()

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        path = self.paths[1]
        with Path(path if isinstance(path, str) else f"/proc/self/fd/{path}").open("r+b") as file:
            yield file

    def _key(self, file: BinaryIO) -> tuple[int, int]:
        head = file.read(STATE.size)
        attempt, moment, size, _ = STATE.unpack(head) if len(head) == STATE.size else (-1, -1, 0, b"")
        return (attempt, moment) if size else (-1, -1)

    @property
    def step(self) -> int:
        """Steps done in the state that was handed over, -1 when there is none."""
        with self._open() as file:
            return self._key(file)[1] // 2

    def read_state(self) -> tuple[tuple[int, int], bytes] | None:
        """(attempt, moment) and bytes of the state that was handed over, verified; None without a whole one."""
        with self._open() as file:
            key = self._key(file)
            data = file.read()
            file.seek(0)
            head = file.read(STATE.size)
        whole = key[1] >= 0 and hashlib.sha256(data).digest() == STATE.unpack(head)[3]
        return (key, data) if whole else None

    def clear_state(self) -> None:
        """Give the memory of the state back."""
        with self._open() as file:
            file.truncate(0)
