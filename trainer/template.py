"""Starting the process that ranks are forked from: Python's own fork server, which imports `trainer.preload` first.

Started before the agent imports torch, it pays for torch (and, for tasks, for the compiler that the first optimizer
step imports) beside the wiring. It has one thread and touches no device, so that forking it is safe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from multiprocessing import forkserver
from typing import Any

from trainer.stop import SIGNALS

KIND = "MUSTER_TEMPLATE"
"""task or script: what to import beforehand."""
PID = 0
"""Of the template; known to itself and to the ranks that are forked from it."""


def start_template(kind: str) -> None:
    """Start the fork server; ranks started with start method `forkserver` come from it."""
    os.environ[KIND] = kind
    multiprocessing.set_forkserver_preload(["trainer.preload"])
    # Schedulers signal every process of a job. Blocked here, a stop request waits until the template has its handlers,
    # and never ends Python's resource tracker, which would take the semaphores of living ranks with it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_template() -> None:
    """End the template, and with it what is left of its ranks, also while it is still importing."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with contextlib.suppress(OSError):
            os.kill(server._forkserver_pid, signal.SIGKILL)
            os.waitpid(server._forkserver_pid, 0)
