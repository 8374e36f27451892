"""Stop requests: a signal only sets a flag, which the training loop reads at its next boundary."""

import ctypes
import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Kubernetes and Docker send TERM, Slurm sends USR2 before a time limit (our template asks for it), a person INT."""

ORPHANED = signal.SIGHUP
"""Tells a supervisor that the command which follows its run is gone. It may come twice, and then changes nothing: the
kernel sends it whenever a thread of the command ends that was the parent meanwhile, and a progress bar has a thread.
"""
SUPERVISOR_SIGNALS = (*SIGNALS, ORPHANED)
"""Whoever starts a supervisor blocks these, so that none is lost before their handlers are there."""


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self.seen: set[str] = set()

    def install(self) -> None:
        """Take over the signals, in the main thread and early; who started this process may have blocked them."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and "SIGINT" in self.seen:
            os._exit(128 + signal.SIGINT)  # a second Ctrl-C: at once
        self.requested = signal.Signals(number).name
        self.seen.add(self.requested)


def set_parent_death_signal(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Make the kernel send this process a signal when its parent ends, and send it now if the parent is gone already.

    The setting survives `exec`, so it may be made for a command between fork and exec.
    """
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG, prctl(2)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def ignore_signals() -> None:
    """Ignore stop requests from here on: Python restores the default handlers when it ends, and SIGTERM would win."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def restore_signals() -> None:
    """Give the signals back the handlers that a Python script starts with."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


FLAG = StopFlag()
"""The flag of this process. A rank inherits it, with its handlers, from the fork server."""
