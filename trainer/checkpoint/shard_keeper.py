"""The same of a training of which each rank holds a shard: each has a memory of its own, and writes its own file.

A state is whole when all ranks have it, so they copy at the same steps, and keep one more copy than others: while one
is being written to the disk, the one before the newest must stay.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from trainer.checkpoint.copies import Contents, read_copy
from trainer.checkpoint.keeper import Keeper
from trainer.checkpoint.memory import FOR_SHARDS, MOMENTS, Memory
from trainer.checkpoint.snapshot import on_cpu
from trainer.checkpoint.writer import LOOK_S, Order
from trainer.parallel.base import Parallel

MEET = 64
"""After so many steps ranks agree again on how often to copy; in the beginning after 1, 2, 4, 8 ..."""
PER_ATTEMPT = 10**6
"""Checkpoints, for which there are numbers."""


class ShardKeeper(Keeper):
    """Has shards copied, found, and written."""

    every = 1
    """Steps between two copies."""
    number = 0
    """Checkpoints so far."""
    prepared: Contents | None = None
    """What is to be written by this process, at once."""

    def find_memory(self) -> Memory | None:
        """This rank's own. An agent that knows nothing of shards has one for a node, which is none for a rank."""
        found = super().find_memory()
        if found is not None and len(found.buffers) != FOR_SHARDS:
            self.recovers, found = False, None
            self.tell("no copies are kept in memory: for that, the job file must say parallel: fsdp")
        return found

    @staticmethod
    def keeps(parallel: Parallel) -> bool:
        return True

    @staticmethod
    def writes(parallel: Parallel) -> bool:
        """Whether this rank is one whose shard is written: where nodes hold the same, those of the first."""
        return parallel.shard is not None and parallel.shard[0] == parallel.rank

    def boundary(self, moment: int, contents: Callable[[], Contents]) -> None:
        step, copies = moment // MOMENTS, self.copies
        if not self.recovers:
            return
        if not step % MEET or (step < MEET and not step & (step - 1)):
            paces = self.parallel.gather(copies.pace.every if copies is not None else 0)
            self.every, self.recovers = max(paces), min(paces) > 0  # else a rank has no room for copies
        if copies is None or step % self.every or moment in copies.moments:
            return
        copies.settle(True)
        index = copies.choose()
        if index is not None and self._fill(copies, index, moment, contents):
            copies.settle(False)

    def recover(self, committed: int, beat: Callable[[], None]) -> Contents | None:
        """This rank's shard of the newest state that all ranks have in memory."""
        if not self.recovers:
            return None
        sealed = self.memory.sealed(self.run) if self.memory else {}
        own = {(seal.moment, seal.attempt): index for index, seal in sealed.items()}
        reports = self.parallel.gather((list(own), committed))
        common = set.intersection(*({(moment, attempt) for moment, attempt in keys} for keys, _ in reports))
        newest = max(common, default=None)
        if newest is None or newest[0] // MOMENTS < reports[0][1]:
            return None
        contents, problem = None, ""
        try:
            assert self.memory is not None
            contents = read_copy(self.memory, own[newest], sealed[own[newest]])
            if contents["shard"] != self.parallel.shard:
                problem = f"rank {self.parallel.rank} holds shard {contents['shard']}, not {self.parallel.shard}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return contents if self._all_have_read(problem, "") else None

    def prepare(self, moment: int, contents: Callable[[], Contents], beat: Callable[[], None]) -> None:
        """Copy the state that is to be written when all ranks have done so: none shall be waited for in vain."""
        beat, copies, orders = self._bound(beat), self.copies, self.orders
        self.number, self.prepared = self.number + 1, None
        if self.asynchronous and copies is not None and orders is not None:
            while orders.count:  # of two that are being written, one would be a copy that others may need
                self._hear(orders, LOOK_S)
                beat()
            copies.settle(True)
            while (index := copies.choose()) is None:
                time.sleep(0.01)  # what an earlier attempt ordered is being written
                beat()
            if self._fill(copies, index, moment, contents):
                return
        self.prepared = on_cpu(contents())

    def save(self, order: Order, moment: int, contents: Contents, beat: Callable[[], None]) -> None:
        """Have what is prepared written: all ranks are ready."""
        number = order.attempt * PER_ATTEMPT + self.number
        order = replace(order, shard=self.parallel.shard, number=number, limit_s=self.limit_s)
        if self.prepared is not None:
            if self.writes(self.parallel):
                self._commit(order, self.prepared, self._bound(beat))
        elif self.copies is not None and self.orders is not None:
            if self.writes(self.parallel):
                self.orders.send(order, *self.copies.hand_on())
            else:
                self.copies.settle(True)
