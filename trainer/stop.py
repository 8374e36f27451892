"""Stop requests: a signal only sets a flag, which the loop reads at its next boundary."""

from __future__ import annotations

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

    def install(self) -> None:
        """Take over the signals; call it in the main thread, early."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == "SIGINT":
            os._exit(128 + signal.SIGINT)  # a second Ctrl-C: at once
        self.requested = signal.Signals(number).name


FLAG = StopFlag()
"""The flag of this process; a rank inherits it, with its handlers, from the template."""
