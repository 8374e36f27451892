"""Stop requests: a signal only sets a flag, which the training loop reads at its next boundary.

And signals that we send: to processes that are known to be ours, because a number is somebody else's after its process.
"""

import ctypes
import os
import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Kubernetes and Docker send TERM, Slurm sends USR2 before a time limit (our template asks for it), a person INT."""

ORPHANED = signal.SIGHUP
"""Tells a supervisor that the command which follows its run is gone. It may come twice, and then changes nothing: the
kernel sends it whenever a thread of the command ends that was the parent meanwhile, and libraries may start threads.
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


def process_stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name: the state, the parent, ... (proc(5)); none of one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def start_of(pid: int) -> str:
    """When a process started, in clock ticks since boot, which tells it from a later one; empty of one that is gone."""
    return "".join(process_stat(pid)[19:20])


def send_signal(pid: int, start: str, number: signal.Signals) -> bool:
    """Send a signal to the process that has this number and started then; False: it is gone."""
    try:
        handle = os.pidfd_open(pid)  # names this process, whoever gets its number later
    except ProcessLookupError:
        return False
    try:
        if start_of(pid) != start:
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def kill_group(leader: int, has_ended: bool) -> bool:
    """Kill a process with its group, or what an ended one left behind in its group; False: there is no such group.

    While anything of a group lives, the kernel gives its number to no new process. So once the leader has ended, a
    process of that number is a stranger's, and the group is gone; unless it is the leader, whom nobody has reaped yet.
    """
    if has_ended and process_stat(leader)[:1] not in ([], ["Z"]):
        return False
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


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
