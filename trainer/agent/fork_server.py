"""Starting the process that ranks are forked from: Python's fork server, importing `fork_server_preload` first.

It is itself forked from the agent, right after that has imported torch, so that a node pays for torch once, and for
what else the ranks need beside the wiring. It has one thread and touches no device, so that forking it is safe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import selectors
import signal
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker, util
from typing import Any

from trainer.signals import SIGNALS

KIND = "MUSTER_TEMPLATE"
"""task or script: what to import beforehand."""
PID = 0
"""Of the template; known to itself and to the ranks that are forked from it."""
REST_S = 2.0
"""After a fork, for the ranks to start undisturbed."""


def start_template(kind: str) -> None:
    """Start the fork server; ranks started with start method `forkserver` come from it.

    Should it die, `multiprocessing` starts another, as a new interpreter: by then the agent has threads.
    """
    os.environ[KIND] = kind
    multiprocessing.set_forkserver_preload(["trainer.agent.fork_server_preload"])
    # Schedulers signal every process of a job. Blocked here, a stop request waits until the template has its handlers,
    # and never ends Python's resource tracker, which would take the semaphores of living ranks with it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    start_interpreter = util.spawnv_passfds
    try:
        import_torch()
        resource_tracker.ensure_running()  # it is started in the same way, and should stay small
        if threading.active_count() == 1:
            util.spawnv_passfds = _fork  # type: ignore[assignment]
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = start_interpreter
        gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def import_torch() -> None:
    """Import what the agent and the ranks need; the caller enables the collector of garbage again."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is told in one line, not by C++ frames
    gc.disable()  # in vain it would look, again and again, through all that was imported: a tenth of the time
    import torch.distributed.elastic.multiprocessing.errors  # noqa: F401

    gc.freeze()


def _fork(path: str, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """Run the program that is the last of `arguments` in a fork of this process instead of in a new interpreter."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for handle in map(int, os.listdir("/proc/self/fd")):
            if handle > 2 and handle not in kept:  # such as the lock of the run, and the pipe that tells our end
                with contextlib.suppress(OSError):
                    os.close(handle)
        # As in a new interpreter: the first of these is locked just now, the other has lost its pipe.
        forkserver._forkserver.__init__()  # type: ignore[misc]
        resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
        exec(arguments[-1], {})
    except SystemExit:
        code = 0
    finally:
        os._exit(code)


def import_when_idle(first: list[str], last: str) -> None:
    """In the template: import `first`, a module at a time, while nobody asks for a rank; `last` after ranks started."""
    original = selectors.DefaultSelector

    class Selector(original):  # type: ignore[valid-type, misc]
        """Of the fork server: imports when it would only wait."""

        asked = False

        def select(self, timeout: float | None = None) -> Any:
            while first or (self.asked and last not in done):
                ready = super().select(REST_S if self.asked else 0)
                if ready:
                    self.asked = True
                    return ready
                name = first.pop(0) if first else last
                done.add(name)
                gc.disable()
                with contextlib.suppress(ImportError):  # the rank will say so, should it need it
                    importlib.import_module(name)
                gc.freeze()
                gc.enable()
            return super().select(timeout)

    def make() -> selectors.BaseSelector:
        selectors.DefaultSelector = original  # type: ignore[misc]
        return Selector()

    done: set[str] = set()
    selectors.DefaultSelector = make  # type: ignore[misc, assignment]


def stop_template() -> None:
    """End the template, and with it what is left of its ranks, also while it is still importing."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with contextlib.suppress(OSError):
            os.kill(server._forkserver_pid, signal.SIGKILL)
            os.waitpid(server._forkserver_pid, 0)
