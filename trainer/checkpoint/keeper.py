"""One rank's part in keeping the state: copies of it in memory, from which attempts go on and checkpoints are written.

What all ranks hold alike, the first rank of each node copies, into memory that its agent owns (`trainer.checkpoint.
memory`). Without an agent there is nothing to recover from; rank 0 copies what a thread of it writes to the disk.
"""

import time
import zlib
from collections.abc import Callable

from trainer.checkpoint.copies import Contents, Copies, read_copy
from trainer.checkpoint.exchange import checksum, give_all
from trainer.checkpoint.memory import MOMENTS, Memory
from trainer.checkpoint.orders import NothingCommitted, Orders
from trainer.checkpoint.snapshot import on_cpu
from trainer.checkpoint.writer import LOOK_S, Order, aside, commit
from trainer.config.job import Job
from trainer.parallel.base import Parallel
from trainer.parallel.patience import TIMES, Patience
from trainer.run.abilities import PASSING
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
        self.run, self.folder = zlib.crc32(run.name.encode()), run.checkpoints
        self.limit_s = TIMES * job.agent.hang_timeout_s
        self.recovers = job.checkpoint.in_memory and bool(read_words(MEMORY))
        if self.recovers and parallel.cuts_model:
            self.recovers = False
            tell(
                "a model in stages is not copied to memory: after a failure, the run goes on from its newest "
                "checkpoint. checkpoint.every_steps says how often there is one"
            )
        self.asynchronous = job.checkpoint.asynchronous
        self.memory = self.find_memory()
        writer = read_path(WRITER) if self.memory else None
        if self.memory is None and self.asynchronous and self.writes(parallel) and (own := Memory.make()).has_locks():
            self.memory = own
            self.memory.attempt = attempt
        self.copies: Copies | None = None
        self.orders: Orders | None = None
        self.failed: OSError | None = None
        """Why the newest save that is over was not committed, where that was spared."""
        if self.memory is not None and self.keeps(parallel):
            self.copies = Copies(self.memory, self.run, attempt, parallel.devices, self.recovers, tell)
            self.orders = Orders(self.memory, writer)

    def find_memory(self) -> Memory | None:
        """The memory that an agent keeps, in which this rank finds and puts copies."""
        return Memory.find()

    @staticmethod
    def keeps(parallel: Parallel) -> bool:
        """Whether this rank copies the state."""
        return parallel.local_rank == 0

    @staticmethod
    def writes(parallel: Parallel) -> bool:
        """Whether this rank has checkpoints written."""
        return parallel.rank == 0

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

    def recover(self, committed: int, beat: Callable[[], None]) -> Contents | None:
        """The newest state in the memory of the nodes, unless rank 0's checkpoint of the step `committed` is newer.

        All ranks get the same; None when there is none. No file is read. `beat`: signs of life.
        """
        if not self.recovers:
            return None
        sealed = self.memory.sealed(self.run) if self.memory else {}
        index = max(sealed, key=lambda index: sealed[index], default=None)
        own = None if index is None else (sealed[index].moment, sealed[index].attempt)
        reports = self.parallel.gather((own, committed))
        keys, committed = [key and tuple(key) for key, _ in reports], reports[0][1]
        newest = max(filter(None, keys), default=None)
        if newest is None or newest[0] // MOMENTS < committed:
            return None
        lacking, source = any(key != newest for key in keys), keys.index(newest)
        contents, problem, check = None, "", ""
        if self.memory and index is not None and (not lacking or self.parallel.rank == source):
            try:
                contents = read_copy(self.memory, index, sealed[index])
                check = checksum(contents) if self.parallel.world_size > 1 and not lacking else ""
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        if not self._all_have_read(problem, check):
            return None
        return give_all(self.parallel, contents, source, beat) if lacking else contents

    def _all_have_read(self, problem: str, check: str) -> bool:
        """Whether all ranks read the same state in memory, and nobody had a problem. Else it is said, and forgotten."""
        said = self.parallel.gather((problem, check))
        found = [each for each, _ in said if each]
        if not found and len({check for _, check in said}) > 1:
            found = ["nodes have different bits in it"]
        if found:
            self.tell(f"the state in memory could not be read, so a checkpoint is: {found[0]}")
            if self.copies is not None:
                self.copies.forget()  # it is not tried again
        return not found

    def prepare(self, moment: int, contents: Callable[[], Contents], beat: Callable[[], None]) -> None:
        """What all ranks do before any of them saves."""

    def save(self, order: Order, moment: int, contents: Contents, beat: Callable[[], None]) -> None:
        """Rank 0 has a checkpoint committed: at once, or from a copy while training goes on. `beat`: signs of life.

        Raises Exception: what went wrong with one before, or at once with this one, unless that is spared.
        """
        beat = self._bound(beat)
        copies, orders = self.copies, self.orders
        if self.asynchronous and copies is not None and orders is not None:
            while self._hear(orders, 0):
                pass
            copies.settle(True)
            while (index := copies.choose()) is None:
                if not self._hear(orders, 0.1):
                    time.sleep(0.01)  # nothing of ours: what an earlier attempt ordered is being written
                beat()
            if self._fill(copies, index, moment, lambda: contents):
                orders.send(order, *copies.hand_on())
                return
        self._commit(order, on_cpu(contents), beat)

    def _commit(self, order: Order, state: Contents, beat: Callable[[], None]) -> None:
        """Commit a checkpoint at once. What goes wrong may be spared."""
        try:
            aside(lambda: commit(order, state), beat=beat)
            self.failed = None
        except OSError as error:
            self._spare(error)

    def _hear(self, orders: Orders, timeout_s: float) -> bool:
        """See `Orders.hear`. What it raises may be spared."""
        try:
            heard = orders.hear(timeout_s)
        except OSError as error:
            self._spare(error)
            return True
        self.failed = None if heard else self.failed
        return heard

    def _spare(self, error: OSError) -> None:
        """Let a save fail, and the next one try again: memory holds the state, so a restart would mend nothing.

        That is said when it begins. Raises OSError: it is no error that passes, or there is no copy in memory.
        """
        if not self.may_fail(error):
            raise error
        if self.failed is None:
            self.tell(
                f"a checkpoint could not be saved: {error}. The training goes on, and Muster tries again with the next "
                "checkpoint. Until one is saved, the state is in memory alone, and is lost if the run ends"
            )
        self.failed = error

    def may_fail(self, error: OSError) -> bool:
        """Whether a save that fails with it may be made up for later."""
        return self.copies is not None and self.recovers and error.errno in PASSING

    def insist(self, save: Callable[[], None], beat: Callable[[], None]) -> None:
        """Return when all is committed that `save` saves, which is tried again for as long as a disk may hang.

        Raises Exception: as `wait`.
        """
        end = time.monotonic() + self.limit_s
        while True:
            save()
            try:
                self.wait(beat)
                return
            except OSError as error:
                if not self.may_fail(error) or time.monotonic() > end:
                    raise
            time.sleep(LOOK_S)
            beat()

    def wait(self, beat: Callable[[], None]) -> None:
        """Return when all is committed. Raises Exception: what went wrong with the newest save, or for good."""
        beat, orders = self._bound(beat), self.orders
        while orders is not None and orders.count:
            self._hear(orders, LOOK_S)
            beat()
        if self.failed is not None:
            raise self.failed

    def _bound(self, beat: Callable[[], None]) -> Callable[[], None]:
        """Signs of life for one wait. They end with NothingCommitted when there was time enough for any disk."""
        patience = Patience(self.limit_s, beat)

        def look() -> None:
            if not patience.look():
                raise NothingCommitted(
                    f"nothing was committed for {self.limit_s:.0f} s, {TIMES} times agent.hang_timeout_s: the disk of "
                    f"{self.folder} hangs, or is that slow"
                )

        return look

    def await_others(self, beat: Callable[[], None]) -> None:
        """Rank 0 waits until nothing of an earlier attempt is being committed any more."""
        beat = self._bound(beat)
        while self.copies is not None and self.parallel.rank == 0 and not self.copies.all_free():
            time.sleep(0.01)
            beat()

    def close(self, beat: Callable[[], None]) -> None:
        """The training has ended. A process of the agent goes on with what is not committed, a thread is waited for.

        Raises Exception: what went wrong with it.
        """
        try:
            if self.orders is not None:
                self.orders.close(self._bound(beat))
        finally:
            if self.copies is not None:
                self.copies.close()
            self.copies = self.orders = None
