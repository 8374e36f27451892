"""Agents that join node 0's: one as it should be, and one that then says whatever a test likes."""

from __future__ import annotations

import contextlib
import socket
import time

from trainer.agent.kv_client import KeyValueClient
from trainer.agent.kv_server import bind
from trainer.agent.proof import Membership, Seal, hello, make_nonce, parse_answer, prove

JOB = Membership("digits-1/0", b"0123456789abcdef" * 4)


def connect(port: int, node: int = 1, membership: Membership = JOB) -> KeyValueClient:
    """An agent as it should be."""
    return KeyValueClient(socket.create_connection(("127.0.0.1", port), 5), membership, node)


class Peer:
    """An agent of node 2 that has proven itself, and then sends what it likes."""

    def __init__(self, port: int) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), 5)
        self.file, nonce = self.connection.makefile("rb"), make_nonce()
        self.connection.sendall(hello(2, nonce) + b"\n")
        theirs, proof = parse_answer(self.file.readline().strip())
        key = JOB.key(2, port, nonce, theirs)
        assert proof == prove(key, b"server")
        self.connection.sendall(prove(key, b"client") + b"\n")
        self.seal = Seal(key, b"client")
        assert b"[true, {" in self.file.readline()

    def send(self, message: bytes) -> None:
        self.connection.sendall(self.seal.close(message))


def ended(connection: socket.socket, bound_s: float = 4.0) -> bool:
    """Whether the other side ends a connection in time, whatever it says until then."""
    end = time.monotonic() + bound_s
    connection.settimeout(bound_s)
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            if time.monotonic() > end:
                return False
    return True


def free_port() -> int:
    """A port that nobody uses at present."""
    with bind("127.0.0.1", 0) as probe:
        port: int = probe.getsockname()[1]
    return port
