"""What rank 0 orders from whoever writes its checkpoints: a process of the agent, or, where there is none, a thread."""

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.serialization import get_safe_globals

from trainer.checkpoint.memory import Memory, Seal
from trainer.checkpoint.writer import Order, rebuild, receive, send, serve


class NothingCommitted(TimeoutError):
    """Our own limit of a wait has passed. Another TimeoutError is an answer, such as that of a soft mount."""


def allowed_by_user() -> list[Any]:
    """What torch.load may make in this process beside torch's own; no other process knows it."""
    every = (item[0] if isinstance(item, tuple) else item for item in get_safe_globals())
    return [item for item in every if str(getattr(item, "__module__", "")).partition(".")[0] != "torch"]


class Orders:
    """Those that were not answered yet."""

    def __init__(self, memory: Memory, writer: Path | None) -> None:
        """`writer`: the socket where the agent starts a process; None: it does not."""
        self.memory, self.writer = memory, writer
        self.connection: socket.socket | None = None
        self.thread: threading.Thread | None = None
        self.count = 0

    def send(self, order: Order, seal: Seal, handle: int) -> None:
        """Order a checkpoint of what lies behind a descriptor, and hand its lock on."""
        try:
            if self.connection is None:
                self.connection = self._connect()
            send(self.connection, {"order": asdict(order), "seal": asdict(seal)}, [handle])
        except (BrokenPipeError, ConnectionResetError):
            raise self._lost() from None
        finally:
            os.close(handle)
        self.count += 1

    def _connect(self) -> socket.socket:
        if self.writer is not None and not allowed_by_user():
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(self.writer))
            return connection
        connection, other = socket.socketpair()
        self.thread = threading.Thread(target=serve, args=(other, self.memory), name="orders", daemon=True)
        self.thread.start()
        return connection

    def hear(self, timeout_s: float) -> bool:
        """Wait for an answer, and return whether one came. Raises Exception: it says what went wrong."""
        if self.connection is None or not self.count:
            return False
        if not select.select([self.connection], [], [], timeout_s)[0]:
            return False
        received = receive(self.connection)
        if received is None:
            raise self._lost()
        self.count -= 1
        if received[0] is not None:
            raise rebuild(received[0])
        return True

    def _lost(self) -> RuntimeError:
        """Nobody answers any more."""
        if self.connection is not None:
            self.connection.close()
        self.connection, self.count = None, 0
        return RuntimeError("the process that writes checkpoints was killed, perhaps for want of memory")

    def wait(self, beat: Callable[[], None]) -> None:
        """Return when all are done, with signs of life by `beat`. Raises Exception: what went wrong."""
        while self.count:
            self.hear(0.5)
            beat()

    def close(self, beat: Callable[[], None]) -> None:
        """Order no more. A process goes on with what is not done, a thread is waited for.

        Raises Exception: what went wrong with it.
        """
        hangs = False
        try:
            if self.connection is not None:
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_WR)  # so that nobody waits for others on our behalf
            if self.thread is not None:
                self.wait(beat)
            while self.hear(0):
                pass
        except NothingCommitted:
            hangs = True
            raise
        finally:
            if self.connection is not None:
                self.connection.close()
            if self.thread is not None and not hangs:
                self.thread.join()
            self.connection = self.thread = None
