"""A loop that calls its user, such as Lightning's, made to go on by turns with others."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable


class Thread:
    """A loop that calls us, in a thread of its own, which goes on only while we wait for it."""

    def __init__(self, loop: Callable[[Callable[[], None]], None]) -> None:
        """Start it, up to its first step; `loop` is given what it must call at the beginning of each."""
        self.left = 0
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._follow, args=(loop,), daemon=True).start()
        self.done.acquire()

    def run(self, steps: int) -> None:
        """Let it do so many steps."""
        self.left = steps
        self.go.release()
        self.done.acquire()

    def _turn(self) -> None:
        if not self.left:
            self.done.release()
            self.go.acquire()
        self.left -= 1

    def _follow(self, loop: Callable[[Callable[[], None]], None]) -> None:
        try:
            loop(self._turn)
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # it never ends by itself
