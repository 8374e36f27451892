"""Starting the process that ranks are forked from: Python's own fork server, which imports `trainer.preload` first.

Started before the agent imports torch, it pays for torch (and, for tasks, for the compiler that the first optimizer
step imports) beside the wiring. It has one thread and touches no device, so that forking it is safe.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver

KIND = "MUSTER_TEMPLATE"
"""task or script: what to import beforehand."""


def start_template(kind: str) -> None:
    """Start the fork server; ranks started with start method `forkserver` come from it."""
    os.environ[KIND] = kind
    multiprocessing.set_forkserver_preload(["trainer.preload"])
    forkserver.ensure_running()
