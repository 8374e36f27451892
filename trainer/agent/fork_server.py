"""Starting the process that ranks are forked from: Python's own fork server, which imports torch once for all of them.

The fork server is a new interpreter with one thread that touches no device, so forking it is safe, and it imports what
`fork_server_preload` names while the agent reads its job and meets the other agents. A rank starts in milliseconds.
"""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from trainer.errors import JobError
from trainer.signals import SIGNALS

PROCESSES = multiprocessing.get_context("forkserver")
"""Makes processes that are forked from it."""
KIND = "MUSTER_FORK_SERVER"
"""The variable that tells the fork server what to import: `task` or `script`, and the agent's process id."""
PRELOAD = "MUSTER_PRELOAD"
"""The variable that holds the modules of the job's `preload`, with commas between them."""
REFUSED: list[JobError] = []
"""In the fork server, and so in each rank: why a module of `preload` cannot be used."""

CLOSING_S = 0.5
"""The longest that a process takes from closing its files to its end."""
ROOT = str(Path(__file__).resolve().parents[2])
"""The folder that our package lies in."""


def prepare_fork_server(kind: str) -> None:
    """Choose what the fork server will be; processes with the start method `forkserver` come from it."""
    os.environ[KIND] = f"{kind} {os.getpid()}"
    os.environ.setdefault("PYTHONHASHSEED", "0")  # sets have one order, on all ranks and after each restart
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # one line of ours for a lost peer, not torch's C++ frames
    os.environ[PRELOAD] = ""
    multiprocessing.set_forkserver_preload(["trainer.agent.fork_server_preload"])


def ensure_fork_server() -> None:
    """Start the fork server if it does not run yet, or has died.

    It looks for modules in its working directory first, then in those of PYTHONPATH, or where we do, by the version of
    Python. Those are the user's, and may hold a `trainer` of their own.
    """
    here = os.open(".", os.O_RDONLY)
    os.chdir(ROOT)
    sys.path.insert(0, ROOT)
    # Schedulers signal every process of a job. Blocked here, a stop request waits until the fork server has handlers,
    # and it never ends Python's resource tracker, which would take the semaphores of living ranks with it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sys.path.remove(ROOT)
        os.chdir(here)
        os.close(here)


def is_gone() -> bool:
    """Whether the fork server has ended. Python's public way to ask starts another one, so this looks at its pid.

    A process closes its files a moment before it has ended, by which its ranks are known to have.
    """
    pid, end = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None), time.monotonic() + CLOSING_S
    while pid is not None:
        try:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
        except ChildProcessError:
            return True
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    return False
