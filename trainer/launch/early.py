"""The head start of `muster run`: an agent imports torch, which takes a second, while the job is still being read.

The command starts the supervisor of a local run before it knows the job, and the supervisor an agent. Both wait to be
told what to do; when the job is refused, or goes elsewhere, they are killed, and so they are when the command is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.signals import FLAG, SIGNALS, end_with

ROOM = 4096
"""For a command line that says more: see `_show_as`."""
ORPHANED = signal.SIGHUP
"""Tells a supervisor that the command it belongs to is gone. It may come twice: the kernel sends it when each of the
command's threads ends that was the parent meanwhile, and a progress bar has one. A second TERM would end all at once.
"""
_begun: Waiting | None = None


class Waiting:
    """A process that waits to be told what to do. What it says meanwhile is kept for its log."""

    def __init__(self, role: str, bound: bool = True) -> None:
        """`role`: a call of a function of this module; `bound`: it dies with this process, until it is told."""
        self.connection, theirs = socket.socketpair()
        self.said = os.memfd_create("said", os.MFD_CLOEXEC)  # not our output: who reads that would wait for its end
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from trainer.launch import early; early.{role}", " " * ROOM],
                stdin=theirs.fileno(), stdout=self.said, stderr=self.said, start_new_session=True,
                preexec_fn=functools.partial(_wait_with, os.getpid() if bound else None),
            )  # fmt: skip

    def tell(self, message: Any, handles: Sequence[int]) -> subprocess.Popen[bytes]:
        """Let it begin; `handles`: files for it to hold, of which the first is its log."""
        data = pickle.dumps(message)
        try:
            socket.send_fds(self.connection, [len(data).to_bytes(8, "little")], handles)
            self.connection.sendall(data)
        except (BrokenPipeError, ConnectionResetError):  # it has ended, which is seen as always
            _copy(self.said, handles[0])
        self._close()
        return self.process

    def drop(self) -> None:
        """There is nothing to do."""
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self.connection.close()
        os.close(self.said)


def main() -> None:
    """What the command `muster` runs."""
    global _begun
    # Python has None for what was closed; what is opened first takes its number.
    sys.stdin, sys.stdout, sys.stderr = (
        file or open(os.devnull, mode)  # noqa: SIM115
        for file, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    if sys.argv[1:2] == ["run"] and not any(word.startswith("-") for word in sys.argv[1:]):
        _begun = Waiting("supervisor(True)")
    from trainer.launch.cli import main

    main()


def take_supervisor(ahead: bool) -> Waiting:
    """The supervisor that was started early, or another; `ahead`: agents are processes, so one may start already."""
    global _begun
    if not ahead:
        drop_supervisor()
    begun, _begun = _begun, None
    return begun or Waiting(f"supervisor({ahead})", bound=False)


def drop_supervisor() -> None:
    """Nothing runs here: end what was started early."""
    global _begun
    if _begun is not None:
        _begun.drop()
        _begun = None


def supervisor(ahead: bool) -> None:
    """Wait for a run, with a waiting agent."""
    first = Waiting("agent()") if ahead else None
    from trainer.launch.local.supervisor import serve

    (run, job, docker, follow), (_, *handles) = _listen()
    _show_as([sys.executable, "-m", "trainer.launch.local.supervisor", str(run)])
    if follow:
        signal.pthread_sigmask(signal.SIG_BLOCK, {ORPHANED})
        end_with(follow, ORPHANED)
    serve(run, job, docker, handles, first)


def agent() -> None:
    """Import torch, then wait for a job."""
    FLAG.install()
    from trainer.agent.fork_server import import_torch

    with contextlib.suppress(Exception):  # which comes again, when there is a log
        import_torch()
    (sys.argv, environment, folder, loaded, parent), _ = _listen()
    _show_as([sys.executable, "-m", *sys.argv])
    end_with(parent)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder or ".")
    if sys.path[0] == "":  # as `python -m` does; in ranks multiprocessing would make it the folder of before
        sys.path[0] = os.getcwd()
    from trainer.__main__ import run

    run(loaded)


def _wait_with(parent: int | None) -> None:
    """In a new process: die with the parent, and keep stop requests until there are handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if parent is not None:
        end_with(parent, signal.SIGKILL)


def _listen() -> tuple[Any, list[int]]:
    """Wait to be told what to do."""
    with socket.socket(fileno=os.dup(0)) as connection:
        head, handles, _, _ = socket.recv_fds(connection, 8, 64)
        if not head:
            os._exit(0)  # there is nothing to do
        with connection.makefile("rb") as stream:
            message = pickle.loads(stream.read(int.from_bytes(head, "little")))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    _copy(1, handles[0])
    for number in (1, 2):
        os.dup2(handles[0], number)
    return message, handles


def _show_as(words: list[str]) -> None:
    """Let `ps` show the command line that would have started this process: people look for their runs by it."""
    numbers = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(numbers[45]), int(numbers[46])  # arg_start and arg_end, proc(5)
    text = "\0".join(words).encode()[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _copy(said: int, log: int) -> None:
    """Append what was said before there was a log."""
    os.write(log, os.pread(said, os.fstat(said).st_size, 0))
