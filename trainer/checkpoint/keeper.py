"""One rank's part in keeping the state: copies of it in memory, from which attempts go on and checkpoints are written.

What all ranks hold alike, the first rank of each node copies, into memory that its agent owns (`trainer.checkpoint.
memory`). Without an agent there is nothing to recover from; rank 0 copies what a thread of it writes to the disk.
"""

import time
import zlib
from collections.abc import Callable
from typing import Any

import torch

from trainer.checkpoint.copies import Contents, Copies, copy_out, open_copy
from trainer.checkpoint.memory import MOMENTS, Memory
from trainer.checkpoint.orders import Orders
from trainer.checkpoint.snapshot import put_together, take_apart
from trainer.checkpoint.writer import Order, commit
from trainer.config.job import Job
from trainer.parallel.base import Parallel
from trainer.run.folder import RunFolder
from trainer.wiring.variables import MEMORY, WRITER, read_path, read_words


class Keeper:
    """Has copies made, found, and written."""

    def __init__(
        self, job: Job, parallel: Parallel, run: RunFolder, attempt: int, differs: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`differs`: whether what ranks hold now is not alike, and that of rank 0 counts. `tell` tells the user."""
        self.parallel, self.differs, self.tell = parallel, differs, tell
        self.run = zlib.crc32(run.name.encode())
        self.recovers = job.checkpoint.in_memory and bool(read_words(MEMORY))
        self.asynchronous = job.checkpoint.asynchronous
        self.memory = Memory.find()
        writer = read_path(WRITER) if self.memory else None
        if self.memory is None and self.asynchronous and parallel.rank == 0 and (own := Memory.make()).has_locks():
            self.memory = own
            self.memory.attempt = attempt
        self.copies: Copies | None = None
        self.orders: Orders | None = None
        if self.memory is not None and parallel.local_rank == 0:
            self.copies = Copies(self.memory, self.run, attempt, parallel.devices, self.recovers, tell)
            self.orders = Orders(self.memory, writer)

    def boundary(self, moment: int, contents: Callable[[], Contents]) -> None:
        """All that was due after a step is done; `moment` as in `Seal`. Copy the state if it is time to."""
        copies = self.copies
        if copies is None or not self.recovers:
            return
        if copies.filling is not None:
            copies.settle(False)
        if moment // MOMENTS % copies.pace.every or copies.filling is not None or moment in copies.moments:
            return
        if self.parallel.rank and self.differs():
            return
        index = copies.choose()
        if index is not None and self._fill(copies, index, moment, contents):
            copies.settle(False)

    def _fill(self, copies: Copies, index: int, moment: int, contents: Callable[[], Contents]) -> bool:
        if copies.fill(index, moment, contents):
            return True
        copies.close()
        self.copies = None
        return False

    def recover(self, committed: int) -> Contents | None:
        """The newest state in the memory of the nodes, unless rank 0's checkpoint of the step `committed` is newer.

        All ranks get the same; None when there is none. No file is read.
        """
        if not self.recovers:
            return None
        sealed = self.memory.sealed(self.run) if self.memory else {}
        index = max(sealed, key=lambda index: sealed[index], default=None)
        own = None if index is None else (sealed[index].moment, sealed[index].attempt)
        reports = self.parallel.gather_objects((own, committed))
        keys, committed = [key for key, _ in reports], reports[0][1]
        newest = max(filter(None, keys), default=None)
        if newest is None or newest[0] // MOMENTS < committed:
            return None
        head, buffer = b"", None
        if self.memory and index is not None and own == newest:
            head, buffer = open_copy(self.memory, index, sealed[index])
        if any(key != newest for key in keys):
            head, buffer = self._hand_on(head, buffer, keys.index(newest), [key != newest for key in keys])
        contents, problem = None, ""
        try:
            contents = copy_out(head, buffer)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = [each for each in self.parallel.gather_objects(problem) if each]
        if not problems:
            return contents
        self.tell(f"the state in memory could not be read, so a checkpoint is: {problems[0]}")
        if self.copies is not None:
            self.copies.forget()  # it is not tried again
        return None

    def _hand_on(self, head: bytes, buffer: Any, source: int, lacking: list[bool]) -> tuple[bytes, Any]:
        """Give a copy to the ranks of nodes that lack it."""
        head, size = self.parallel.share((head, buffer and len(buffer)), source)
        needed = lacking[self.parallel.rank]
        if needed:
            buffer = bytearray(size)
        mine = needed or self.parallel.rank == source
        data = torch.frombuffer(buffer if mine else bytearray(1), dtype=torch.uint8)
        self.parallel.hand_on(data, source, [rank for rank, lacks in enumerate(lacking) if lacks])
        return head, buffer

    def save(self, order: Order, moment: int, contents: Contents, beat: Callable[[], None]) -> None:
        """Rank 0 has a checkpoint committed: at once, or from a copy while training goes on. `beat`: signs of life.

        Raises Exception: what went wrong with one before, or at once with this one.
        """
        copies, orders = self.copies, self.orders
        if self.asynchronous and copies is not None and orders is not None:
            while orders.hear(0):
                pass
            copies.settle(True)
            while (index := copies.choose()) is None:
                if not orders.hear(0.1):
                    time.sleep(0.01)  # nothing of ours: what an earlier attempt ordered is being written
                beat()
            if self._fill(copies, index, moment, lambda: contents):
                orders.send(order, *copies.hand_on())
                return
        tree, tensors = take_apart(contents)
        commit(order, put_together(tree, [tensor.cpu() for tensor in tensors]))

    def wait(self, beat: Callable[[], None]) -> None:
        """Return when everything is committed. Raises Exception: what went wrong."""
        if self.orders is not None:
            self.orders.wait(beat)

    def await_others(self, beat: Callable[[], None]) -> None:
        """Rank 0 waits until nothing of an earlier attempt is being committed any more."""
        while self.copies is not None and self.parallel.rank == 0 and not self.copies.all_free():
            time.sleep(0.01)
            beat()

    def close(self, beat: Callable[[], None]) -> None:
        """The training has ended. A process of the agent goes on with what is not committed, a thread is waited for.

        Raises Exception: what went wrong with it.
        """
        try:
            if self.orders is not None:
                self.orders.close(beat)
        finally:
            if self.copies is not None:
                self.copies.close()
            self.copies = self.orders = None
