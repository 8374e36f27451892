"""Where all ranks stop when any of them is asked to: they agree beside the training, and no step pays for it.

All ranks pass the same sequence of ticks: the boundaries between steps, and those between the rounds of an evaluation.
A rank that is asked, or hears that another was, freezes: its main thread passes no further tick until all ranks have
said how many they passed. They stop at the next tick after the furthest of them: nobody is beyond, and all get there.
A thread says it, because the main thread may be inside a collective that waits for a rank which is frozen already.
"""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from trainer.signals import FLAG, StopFlag

LOOK_S, LOOK_EACH_S = 0.2, 0.0005
"""Seconds between two looks whether another was asked; or per rank, where that is more. They take 0.1 % of a CPU."""
JOIN_S = 1.0
"""For a look that is going on; a store that does not answer would keep it for ever."""

_numbers = itertools.count()
"""Of the objects of this process. All ranks make theirs in the same order, so they need no other name."""


class Stops:
    """One rank's side of the agreement."""

    def __init__(
        self, rank: int, world_size: int, beat: Callable[[], None] = lambda: None, flag: StopFlag = FLAG,
        store: Any = None,
    ) -> None:  # fmt: skip
        """Several ranks must be in a process group, or have a `store`. `beat` is called while others are waited for."""
        self.rank, self.world_size, self.beat, self.flag = rank, world_size, beat, flag
        self.passed = 0
        """Ticks that this rank has passed."""
        self.told = 0
        self.frozen = False
        """Whether it may pass no further one before `last` is known."""
        self.last = 1
        """The tick to stop at, once it is known."""
        self.error: Exception | None = None
        self.lock, self.closed = threading.Lock(), False
        self.connected, self.known, self.wake = threading.Event(), threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        if world_size > 1:
            arguments = f"stops-{next(_numbers)}", store
            self.thread = threading.Thread(target=self._watch, args=arguments, name="stops", daemon=True)
            self.thread.start()

    def tick(self) -> bool:
        """Whether to stop here: called by all ranks alike, it returns True at the same tick on all of them.

        Raises RuntimeError: this rank was asked, or heard of it, and lost the others.
        """
        with self.lock:
            if not self.frozen and self.flag.requested is None:
                self.passed += 1
                return False
            self.frozen = True
        if self.thread is None:
            return True
        self.wake.set()
        while not self.known.wait(1.0):
            self.beat()
        if self.error is not None:
            raise RuntimeError(f"the ranks could not agree on where to stop: {self.error}") from self.error
        self.passed += 1
        return self.passed >= self.last

    def tell(self, key: str, value: str, limit_s: float, beat: Callable[[], None]) -> dict[int, str]:
        """Tell all ranks a value, beside any collective; what they told, within a limit, by their ranks."""
        self.told += 1
        end, found = time.monotonic() + limit_s, {self.rank: value}
        if not self.connected.wait(limit_s):
            return found
        store = self.store
        store.set(f"{key}-{self.told}-{self.rank}", value)
        while len(found) < self.world_size and time.monotonic() < end:
            for rank in set(range(self.world_size)) - found.keys():
                if store.check([f"{key}-{self.told}-{rank}"]):
                    found[rank] = store.get(f"{key}-{self.told}-{rank}").decode()
            beat()
            time.sleep(0.01)
        return found

    def close(self) -> None:
        """End the thread. All ranks must have passed their last tick: the others may wait for this one's answer."""
        self.closed = True
        self.wake.set()
        if self.thread is not None:
            self.thread.join(JOIN_S)

    def _watch(self, name: str, store: Any) -> None:
        from torch.distributed import PrefixStore

        try:
            self.store = PrefixStore(name, store or _clone_default_store())
            self.connected.set()
            pause = max(LOOK_S, LOOK_EACH_S * self.world_size)
            while not (self.frozen or self.flag.requested is not None or self.store.check(["frozen"])):
                self.wake.wait(pause)
                if self.closed:
                    return
            self._agree(pause)
        except Exception as error:  # the store is gone: its host has ended, so this rank will, too
            self.error = error
        self.known.set()

    def _agree(self, pause: float) -> None:
        """Freeze, tell the others, and wait until all have."""
        with self.lock:
            self.frozen = True
        self.store.set(str(self.rank), str(self.passed))
        if self.store.add("frozen", 1) == self.world_size:
            furthest = max(int(self.store.get(str(rank))) for rank in range(self.world_size))
            self.store.set("last", str(furthest + 1))
        wait = 0.002
        while not self.store.check(["last"]):
            if self.closed:
                return
            time.sleep(wait)
            wait = min(2 * wait, pause)
        self.last = int(self.store.get("last"))


def _clone_default_store() -> Any:
    """The store of the process group, by a connection of its own, which can take seconds: torch asks a name server.

    The main thread uses the group's own, for a new group even while it waits for the others; they share it before torch
    2.8, which cannot clone it. The name is private because no public one is in all versions of torch.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    return store.clone() if hasattr(store, "clone") else store
