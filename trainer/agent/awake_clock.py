"""The time that an agent was awake, by which it measures how long others have been silent.

A job can be stopped as a whole and go on later: by SIGSTOP, Slurm's suspend, `docker pause`, a laptop's lid. Nobody was
late while everybody stood still, so a gap in the agent's own clock counts for nothing.
"""

import threading
import time
from collections.abc import Callable

TICK_S = 0.25
"""How often the clock is looked at, whatever else the agent does."""
GAP_S = 2.0
"""A longer time between two looks means that this process could not run."""


class AwakeClock:
    """A clock that stands still while this process does."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.lock = clock, threading.Lock()
        self.looked = self.woke = clock()
        self.asleep_s = 0.0
        self.ticker: threading.Thread | None = None

    def now(self) -> float:
        """Seconds, to be compared with what this clock said before. The first call starts its thread."""
        with self.lock:
            if self.ticker is None:
                self.looked = self.clock()
                self.ticker = threading.Thread(target=self._tick, name="clock", daemon=True)
                self.ticker.start()
            return self._look()

    def since(self, moment: float) -> float:
        """Seconds since a `moment` of the underlying clock, but at most those since this process woke up."""
        self.now()
        with self.lock:
            return self.looked - max(moment, self.woke)

    def _look(self) -> float:
        now = self.clock()
        if now - self.looked > GAP_S:
            self.asleep_s += now - self.looked
            self.woke = now
        self.looked = now
        return now - self.asleep_s

    def _tick(self) -> None:
        while True:
            time.sleep(TICK_S)
            with self.lock:
                self._look()


CLOCK = AwakeClock()
"""The clock of this process."""
