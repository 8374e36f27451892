"""Copies of a state in the buffers of a node, made by one rank; and how often to make them.

On a GPU the copies are queued behind the step, and the process does not wait for them. A stream of their own would gain
nothing, because the next step may not change what is still being copied.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainer.checkpoint.memory import Memory, Seal
from trainer.checkpoint.snapshot import Buffer, Layout, interpret, put_together, read_raw, take_apart
from trainer.wiring.hardware import free_memory

ROOM = 0.8
"""Of the free memory, that copies may take."""
SHARE = 0.005
"""Of the time, that copies may take which are made in case of a failure."""
Contents = dict[str, Any]


class Pace:
    """After which steps to copy the state; always powers of two, so that nodes which measure alike copy together."""

    def __init__(self) -> None:
        self.every = 1
        self.step, self.ended = 0, 0.0
        """Of the last copy."""

    def took(self, step: int, began: float, seconds: float) -> None:
        """The state after `step` was copied from `began` on, which delayed the training by so much."""
        if 0 < self.step < step:
            each = (began - self.ended) / (step - self.step)
            self.every = 1 << math.ceil(math.log2(max(1.0, seconds / (SHARE * max(each, 1e-6)))))
        self.step, self.ended = step, time.perf_counter()


@dataclass(frozen=True)
class Filling:
    """A copy that may still go on, on GPUs."""

    index: int
    seal: Seal
    head: bytes
    began: float
    called_s: float
    """How long it was to queue it."""
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]]
    """Before and after it, on each device."""


class Copies:
    """Those of one rank, which fills the buffers by turns."""

    def __init__(
        self, memory: Memory, run: int, attempt: int, devices: list[torch.device], both: bool,
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`both`: one is kept while the other is filled; else a second is used only if the first is being written."""
        self.memory, self.run, self.attempt, self.both, self.tell = memory, run, attempt, both, tell
        self.devices = [device for device in devices if device.type == "cuda"]
        self.pace = Pace()
        self.count = len(memory.buffers)
        sealed = memory.sealed(run)
        self.moments = [sealed[index].moment if index in sealed else -1 for index in range(self.count)]
        self.handle: int | None = None
        """A descriptor of the buffer that is being filled, with its lock."""
        self.buffers = [Buffer(bool(self.devices)) for _ in range(self.count)]
        self.layout = Layout([])
        self.filling: Filling | None = None
        os.register_at_fork(after_in_child=self.let_go)

    def let_go(self) -> None:
        """Give the lock back; also in a process that is forked from this one, or it would outlive it there."""
        if self.handle is not None:
            os.close(self.handle)
        self.handle = None

    def choose(self) -> int | None:
        """Lock the buffer to fill next; None while all are being written to the disk."""
        assert self.handle is None
        first = self.moments if self.both else [not buffer.size for buffer in self.buffers]
        for index in sorted(range(self.count), key=lambda index: first[index]):
            self.handle = self.memory.lock(index)
            if self.handle is not None:
                return index
        return None

    def fill(self, index: int, moment: int, contents: Callable[[], Contents]) -> bool:
        """Begin to copy a state into a buffer that `choose` chose; False: it has no place there, and never will.

        What it takes to gather the `contents` is part of what the copy costs.
        """
        began = time.perf_counter()
        assert self.handle is not None
        tree, tensors = take_apart(contents())
        if not self.layout.fits(tensors):
            self.layout = Layout(tensors)
        try:
            if self.layout.size > self.buffers[index].size:
                self._check_room()
            self.memory.unseal(index)
            self.moments[index] = -1
            begins = [self._mark(device) for device in self.devices]
            head = self.buffers[index].write(self.handle, self.layout, tensors, tree)
        except (MemoryError, OSError) as error:
            self.tell(f"no copy of the state is kept in memory, because it does not fit: {error}")
            return False
        marks = list(zip(begins, map(self._mark, self.devices), strict=True))
        seal = Seal(moment, self.attempt, self.layout.size, len(head), self.run)
        self.filling = Filling(index, seal, head, began, time.perf_counter() - began, marks)
        return True

    def _check_room(self) -> None:
        """Raises MemoryError: copies of this size do not fit beside what the node needs now."""
        used = sum(os.stat(path).st_blocks * 512 for path in self.memory.buffers)
        missing, free = self.layout.size * (self.count if self.both else 1) - used, free_memory()
        if missing > ROOM * free:
            raise MemoryError(f"{missing >> 20} MiB are missing, {free >> 20} MiB are free")

    def _mark(self, device: torch.device) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def settle(self, wait: bool) -> None:
        """Seal what is copied; on a GPU that may take until the next boundary, unless this shall `wait`."""
        filling = self.filling
        if filling is None:
            return
        for _, end in filling.marks:
            if wait:
                end.synchronize()
            elif not end.query():
                return
        self._seal(filling)
        self.let_go()

    def _seal(self, filling: Filling) -> None:
        self.memory.seal(filling.index, filling.seal, filling.head)
        self.moments[filling.index], self.filling = filling.seal.moment, None
        copied_s = max((begin.elapsed_time(end) / 1000 for begin, end in filling.marks), default=0.0)
        self.pace.took(filling.seal.step, filling.began, max(filling.called_s, copied_s))

    def hand_on(self) -> tuple[Seal, int]:
        """The seal of what is being copied, and a descriptor of the buffer, with the lock that was this rank's."""
        filling, handle, self.handle = self.filling, self.handle, None
        assert filling is not None and handle is not None
        for _, end in filling.marks:
            end.synchronize()
        self._seal(filling)
        return filling.seal, handle

    def forget(self) -> None:
        """Let nobody read what the buffers hold."""
        for index in range(self.count):
            self.memory.unseal(index)
        self.moments = [-1] * self.count

    def all_free(self) -> bool:
        """Whether nothing is being written to the disk."""
        handles = [self.memory.lock(index) for index in range(self.count)]
        for handle in handles:
            if handle is not None:
                os.close(handle)
        return None not in handles

    def close(self) -> None:
        """Leave the buffers to others."""
        with contextlib.suppress(RuntimeError):  # of a GPU that failed
            self.settle(False)
        if self.filling is None:  # else a GPU still writes there, or hangs
            self.let_go()
            for buffer in self.buffers:
                buffer.close()


def read_copy(memory: Memory, index: int, seal: Seal) -> Contents:
    """The state in a sealed buffer, copied: it will be filled again."""
    with open(memory.buffers[index], "r+b") as file:
        tree, tensors = interpret(*read_raw(file.fileno(), seal))
    contents: Contents = put_together(tree, [tensor.clone() for tensor in tensors])
    return contents
