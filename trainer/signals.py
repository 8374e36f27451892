"""Stop requests: a signal only sets a flag, which the loop reads at its next boundary."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Kubernetes and Docker send TERM; Slurm USR2, by our template, before a time limit; a person INT."""


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        """Nobody asked yet."""
        self.requested: str | None = None
        self.seen: set[str] = set()
        self.interrupts = 0

    def install(self) -> None:
        """Take over the signals, in the main thread and early; who started this process may have blocked them."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts > 1:
                os._exit(128 + signal.SIGINT)  # a second Ctrl-C: at once
        self.requested = signal.Signals(number).name
        self.seen.add(self.requested)


def end_with(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Let this process get a signal when its parent is gone: SIGTERM stops it with a checkpoint."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG, prctl(2)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def ignore_signals() -> None:
    """Let nothing change the exit code any more: Python ends with default handlers, where SIGTERM would win."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_signals() -> None:
    """Let signals do what a script expects of them."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


FLAG = StopFlag()
"""The flag of this process; a rank inherits it, with its handlers, from the template."""
