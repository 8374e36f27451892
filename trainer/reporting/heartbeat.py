"""Heartbeats: each rank writes its step into shared memory, and its agent notices when a rank no longer does.

There is also room for a rank's last words: no disk can be too full for them.
"""

import mmap
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.wiring import variables

SLOT = struct.Struct("<dqq")
"""Monotonic seconds, step, phase."""
LENGTH = struct.Struct("<q")
"""Of the last words, which follow."""
ROOM = 8192
"""Bytes of each rank, for both."""
PHASES = ("starting", "training", "evaluating", "saving", "finishing", "beginning", "script")
FIRST_PHASES = ("starting", "beginning")
"""Until the first step is done: imports, data and model; then the loop, whose first step may compile."""
UNSEEN = ("starting", "script")
"""Of a script that has not begun a session, or has none: its agent beats for it."""
HEARTBEAT = "heartbeat"
"""The file in an agent's own folder."""


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank."""

    time: float
    """By `time.monotonic`, which processes of one machine share."""
    step: int
    phase: str


class Heartbeat:
    """The slots of one node's ranks, in a file that both sides map; whoever comes first makes it."""

    def __init__(self, path: Path, ranks: int) -> None:
        size = ROOM * ranks
        with path.open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # never shortens what another rank just made
            self.memory = mmap.mmap(file.fileno(), size)

    def beat(self, local_rank: int, step: int, phase: str) -> None:
        """Write a sign of life: half a microsecond."""
        SLOT.pack_into(self.memory, local_rank * ROOM, time.monotonic(), step, PHASES.index(phase))

    def read(self, local_rank: int) -> Beat:
        """The last sign of life; time 0 before the first."""
        when, step, phase = SLOT.unpack_from(self.memory, local_rank * ROOM)
        return Beat(when, step, PHASES[phase])

    def clear(self, local_rank: int) -> None:
        """Forget the rank's beats, because a new process takes its place."""
        SLOT.pack_into(self.memory, local_rank * ROOM, 0.0, 0, 0)
        LENGTH.pack_into(self.memory, local_rank * ROOM + SLOT.size, 0)

    def leave_words(self, local_rank: int, choice: Iterable[bytes]) -> None:
        """Let the agent know why this rank ends, by the first of some words for which there is room."""
        begin = local_rank * ROOM + SLOT.size
        words = next((words for words in choice if len(words) <= ROOM - SLOT.size - LENGTH.size), None)
        if words is not None:
            self.memory[begin + LENGTH.size : begin + LENGTH.size + len(words)] = words
            LENGTH.pack_into(self.memory, begin, len(words))  # last: until then nobody reads them

    def words(self, local_rank: int) -> bytes:
        """Why a rank ended; empty when it did not say so."""
        begin = local_rank * ROOM + SLOT.size
        (length,) = LENGTH.unpack_from(self.memory, begin)
        return self.memory[begin + LENGTH.size : begin + LENGTH.size + length]


class Pulse:
    """One rank's side. Without an agent, whose file the environment names, it does nothing."""

    def __init__(self, local_rank: int) -> None:
        path = variables.read_path(variables.HEARTBEAT)
        self.local_rank = local_rank
        self.heartbeat = Heartbeat(path, local_rank + 1) if path else None

    def beat(self, step: int, phase: str) -> None:
        if self.heartbeat is not None:
            self.heartbeat.beat(self.local_rank, step, phase)

    def leave_words(self, choice: Iterable[bytes]) -> None:
        if self.heartbeat is not None:
            self.heartbeat.leave_words(self.local_rank, choice)
