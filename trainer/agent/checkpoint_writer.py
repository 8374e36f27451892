"""The process that writes checkpoints, so that neither a rank's end nor its work is in the way of one.

It comes from the fork server when a rank has something to save, and serves that rank to the end of its orders: see
`trainer.checkpoint.writer`. The rank of the next attempt waits for it, and then gets one of its own.
"""

import contextlib
import os
import signal
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from trainer.agent.fork_server import PROCESSES
from trainer.checkpoint.memory import Memory
from trainer.run.event_files import write_as
from trainer.run.output import never_fail
from trainer.signals import ignore_signals, set_parent_death_signal
from trainer.wiring.variables import WRITER


class CheckpointWriter:
    """The agent's side."""

    def __init__(self, folder: Path, memory: Memory, node: int, name: str = "writer") -> None:
        """`folder`: of this agent alone, which is that of a node; `name`: of the socket in it."""
        self.memory, self.node = memory, node
        self.process: BaseProcess | None = None
        self.folder = os.open(folder, os.O_PATH | os.O_DIRECTORY)  # a name through it is short enough for a socket
        self.listener = socket.socket(socket.AF_UNIX)
        self.name = name
        self.listener.bind(f"/proc/self/fd/{self.folder}/{name}")
        self.listener.listen()
        self.listener.setblocking(False)

    def environment(self) -> dict[str, str]:
        """What lets ranks find it."""
        return {WRITER: f"/proc/{os.getpid()}/fd/{self.folder}/{self.name}"}

    def wakes(self) -> Any:
        """What is ready when `look` has something to do."""
        return self.process.sentinel if self.process else self.listener

    def look(self) -> None:
        """Start a process if a rank asks for one, and the one before has ended."""
        if self.process is not None and self.process.exitcode is None:
            return
        self.process = None
        try:
            connection, _ = self.listener.accept()
        except BlockingIOError:
            return
        with connection:
            process = PROCESSES.Process(
                target=write, args=(connection, self.memory.paths, self.node), name="muster-writer"
            )
            process.start()  # where the fork server is gone, there is none
            self.process = process

    def close(self, patience_s: float) -> None:
        """Let it finish, within a bound."""
        self.listener.close()
        os.close(self.folder)
        if self.process is not None:
            self.process.join(patience_s)
            self.process.kill()
            self.process.join()


def write(connection: socket.socket, paths: tuple[str, ...], node: int) -> None:
    """The body of the process."""
    never_fail()
    write_as(node)
    set_parent_death_signal(os.getppid(), signal.SIGKILL)  # the fork server's end is the agent's
    ignore_signals()
    with contextlib.suppress(OSError):  # a sandbox may refuse; `top` tells it by this name
        Path("/proc/self/comm").write_text("muster-writer")
    import torch

    from trainer.checkpoint.writer import serve

    torch.set_num_threads(1)
    serve(connection, Memory(*paths))
