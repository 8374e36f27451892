"""How long a rank waits for a disk, and counts as alive while it does."""

import time
from collections.abc import Callable

TIMES = 10
"""As many times `agent.hang_timeout_s` rank 0 waits for checkpoints, and the other ranks twice as long for rank 0."""
LOOK_S = 1.0
"""Between two looks it is no longer, or the process was stopped in between, which does not count."""


class Patience:
    """One wait."""

    def __init__(self, limit_s: float, beat: Callable[[], None]) -> None:
        """`beat`: signs of life."""
        self.limit_s, self.beat = limit_s, beat
        self.waited_s, self.looked = 0.0, time.monotonic()

    def look(self) -> bool:
        """Give a sign of life; False: there was time enough, and from now on there are none."""
        now = time.monotonic()
        self.waited_s, self.looked = self.waited_s + min(now - self.looked, LOOK_S), now
        if self.waited_s > self.limit_s:
            return False
        self.beat()
        return True

    def watch(self, is_done: Callable[[], bool]) -> None:
        """Give signs of life until something is done, or there was time enough."""
        pause_s = 0.001
        while not is_done() and self.look():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)
