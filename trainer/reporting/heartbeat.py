"""Heartbeats: each rank writes its step into shared memory, and its agent notices when a rank no longer does."""

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.wiring import variables

SLOT = struct.Struct("<dqq")
"""Monotonic seconds, step, phase."""
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
        size = SLOT.size * ranks
        with path.open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # never shortens what another rank just made
            self.memory = mmap.mmap(file.fileno(), size)

    def beat(self, local_rank: int, step: int, phase: str) -> None:
        """Write a sign of life: half a microsecond."""
        SLOT.pack_into(self.memory, local_rank * SLOT.size, time.monotonic(), step, PHASES.index(phase))

    def read(self, local_rank: int) -> Beat:
        """The last sign of life; time 0 before the first."""
        when, step, phase = SLOT.unpack_from(self.memory, local_rank * SLOT.size)
        return Beat(when, step, PHASES[phase])

    def clear(self, local_rank: int) -> None:
        """Forget the rank's beats, because a new process takes its place."""
        SLOT.pack_into(self.memory, local_rank * SLOT.size, 0.0, 0, 0)


class Pulse:
    """One rank's side. Without an agent, whose file the environment names, it does nothing."""

    def __init__(self, local_rank: int) -> None:
        path = variables.read_path(variables.HEARTBEAT)
        self.local_rank = local_rank
        self.heartbeat = Heartbeat(path, local_rank + 1) if path else None

    def beat(self, step: int, phase: str) -> None:
        if self.heartbeat is not None:
            self.heartbeat.beat(self.local_rank, step, phase)
