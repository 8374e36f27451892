"""Programs of somebody else that reach a job's ports: some listen where the job will, others call who listens."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from muster_runs import descendants

Trick = Callable[[socket.socket, "Impostor"], None]


class Impostor:
    """Listens on a port; does one trick with each connection, the last one with all that follow."""

    def __init__(self, port: int, *tricks: Trick, real: int, public: bytes) -> None:
        """`real`: the port of the one that is imitated; `public`: what everybody knows of the job, a greeting once."""
        self.tricks, self.real, self.public = list(tricks), real, public
        self.callers = self.open = 0
        self.recorded: list[bytes] = []
        """What the real one said to a caller that was passed on to it, message by message ..."""
        self.said: list[bytes] = []
        """... and that caller to it."""
        self.server = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.server.accept()
                threading.Thread(target=self.talk, args=[connection], daemon=True).start()

    def talk(self, connection: socket.socket) -> None:
        trick = self.tricks[min(self.callers, len(self.tricks) - 1)]
        self.callers, self.open = self.callers + 1, self.open + 1
        with connection, contextlib.suppress(OSError):
            trick(connection, self)
        self.open -= 1


def close(connection: socket.socket, _: Impostor) -> None:
    """Hangs up."""


def hang(connection: socket.socket, _: Impostor) -> None:
    """Says nothing until the caller has gone."""
    while connection.recv(1 << 16):
        pass


def echo(connection: socket.socket, _: Impostor) -> None:
    """Sends back whatever it gets."""
    while part := connection.recv(1 << 16):
        connection.sendall(part)


def greet(connection: socket.socket, impostor: Impostor) -> None:
    """Answers with what everybody knows, and obeys no further."""
    while connection.recv(1 << 16):
        connection.sendall(impostor.public + b"\n")


def relay(connection: socket.socket, impostor: Impostor) -> None:
    """Stands in the middle: passes everything on to the real one, and back."""
    with socket.create_connection(("127.0.0.1", impostor.real)) as real:

        def back() -> None:
            with contextlib.suppress(OSError):
                while part := real.recv(1 << 16):
                    impostor.recorded.append(part)
                    connection.sendall(part)
                connection.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=back, daemon=True).start()
        while part := connection.recv(1 << 16):
            impostor.said.append(part)
            real.sendall(part)


def replay(connection: socket.socket, impostor: Impostor) -> None:
    """Says again what the real one said to an earlier caller."""
    for part in impostor.recorded:
        connection.sendall(part)
        if not connection.recv(1 << 16):
            return
    hang(connection, impostor)


@contextlib.contextmanager
def impostors(ports: list[int], tricks: list[list[Trick]], public: bytes) -> Iterator[list[Impostor]]:
    """On the first ports, one for each list of tricks; the real one will have to take the next."""
    real = ports[len(tricks)]
    found = [Impostor(port, *each, real=real, public=public) for port, each in zip(ports, tricks, strict=False)]
    try:
        yield found
    finally:
        for each in found:
            each.server.close()


def nonsense(public: bytes) -> list[bytes]:
    """What ended a board, an agent or a job once: bare, behind what everybody knows of the job, and behind a greeting
    in the right form with a proof that proves nothing.
    """
    ends = [b'["set", "stop", true]\n', b'["set", "end", ["a stranger", 64]]\n', b'["join", "2/wishes", "hung"]\n']
    names = b"[" + b", ".join([b'"get"', *[b'"1/plan"'] * 6000]) + b"]\n"  # 60 KB, and an answer of megabytes
    deep, letters = b"[" * 50_000 + b"\n", bytes(range(256)) * 40
    bare = [deep, letters, b"\n" * 1000, *ends, names, b'{"a": ' * 9000 + b"\n", b"x" * (1 << 20)]
    nodes = (b"1", b"999", b"-1", b"1e999", b"9" * 5000, b"[" * 50_000, b"\xff")
    digits = b"0123456789abcdef" * 4
    greetings = [public + node + b"\n" for node in nodes]
    greetings += [b"muster 1 %s %s\n%s\n" % (node, digits, digits) for node in nodes]
    return [*bare, *(greeting + b"".join(ends) + deep for greeting in greetings), greetings[0] + names]


def call(port: int, data: bytes, patience_s: float = 0.3) -> bytes:
    """Send something, before and after the other side speaks; return what it says."""
    heard = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.settimeout(patience_s)
        connection.sendall(data)
        while part := connection.recv(1 << 16):
            heard += part
            connection.sendall(data)
    return heard


@contextlib.contextmanager
def lingering(port: int, public: bytes, idle: int) -> Iterator[None]:
    """Callers that stay: many that say nothing, one that speaks slowly, and some that send and never read."""
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(idle)]

        def dribble() -> None:
            for number in public * 100:
                if over.wait(0.1):
                    return
                with contextlib.suppress(OSError):
                    held[0].sendall(bytes([number]))

        def shout(connection: socket.socket) -> None:
            connection.settimeout(0.1)
            while not over.wait(0.01):
                with contextlib.suppress(OSError):
                    connection.sendall(public + b'1\n["get", "1/plan"]\n' * 1000)

        targets = [threading.Thread(target=dribble), *(threading.Thread(target=shout, args=[s]) for s in held[1:4])]
        for thread in targets:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in targets:
                thread.join()


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def scribble(port: int, file: Path) -> list[str]:
    """Put what makes `file`, when it is unpickled, over all values of torch's store; delete one; return the keys."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=5), wait_for_workers=False)
    keys = list(store.list_keys())
    for key in keys:
        store.set(key, pickle.dumps(Payload(file)))
    for key in keys[:1]:
        store.delete_key(key)
    return keys


def stores(agent: int) -> list[int]:
    """The ports on which an agent's processes listen that are neither it nor ranks: torch's store for its ranks."""
    inodes = set()
    for pid in descendants(agent):
        with contextlib.suppress(OSError):
            if not Path(f"/proc/{pid}/comm").read_text().startswith("muster-rank"):
                inodes |= {os.readlink(handle) for handle in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return [int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
