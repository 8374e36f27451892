"""The board: small values that the agents of a job share. Node 0's agent keeps it and serves it to the others.

Not torch's TCPStore: its clients wait without bound for a server that does not answer (torch 2.13: every operation
but `set`), and it asks nobody who he is.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

CONNECT_S = 1.0
"""For a connection and its first answer."""
ANSWER_S = 10.0
"""For an answer: longer means that node 0 or the way to it is gone."""
BEAT_S = 1.0
SILENT_S = 15.0
"""Seconds without a beat of an agent until its node counts as lost; a connection that ends counts at once."""
LONGEST = 1 << 20
"""Bytes of a message."""


class PeerLost(RuntimeError):
    """Another node did not answer, or did not come back, within its bound."""


class Board:
    """Node 0's side: the values, and a thread that serves them once `listen` was called."""

    def __init__(self, identity: str) -> None:
        """`identity`: what a client must say, and is told, before anything else."""
        self.identity = identity
        self.values: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.clients: dict[int, _Client] = {}
        self.selector: selectors.BaseSelector | None = None

    def put(self, key: str, value: Any) -> None:
        """Set a value; anything that JSON can say."""
        self._do(["put", key, value])

    def add(self, key: str, number: int) -> int:
        """Add to a counter and return it."""
        return int(self._do(["add", key, number]))

    def look(self, *keys: str) -> list[Any]:
        """Values, None for those that nobody has put."""
        found: list[Any] = self._do(["look", *keys])
        return found

    def _do(self, request: Sequence[Any]) -> Any:
        word, *rest = request
        with self.lock:
            if word == "put":
                self.values[rest[0]] = rest[1]
            elif word == "add":
                self.values[rest[0]] = self.values.get(rest[0], 0) + rest[1]
                return self.values[rest[0]]
            elif word == "look":
                return [self.values.get(key) for key in rest]
        return None  # a beat

    def listen(self, address: str, ports: Sequence[int]) -> int:
        """Serve on the first of `ports` that is free; return it. `address` empty: on every interface.

        Raises:
            OSError: none is free.
        """
        refused = []
        for port in ports:
            try:
                listener = bind(address, port)
            except OSError as error:
                refused.append(f"{port}: {error.strerror}")
                continue
            listener.settimeout(CONNECT_S)
            self.selector = selectors.DefaultSelector()
            self.selector.register(listener, selectors.EVENT_READ)
            threading.Thread(target=self._serve, args=(listener,), name="board", daemon=True).start()
            return port
        raise OSError(f"port: none of {len(refused)} candidates could be bound: {'; '.join(refused[:3])} ...")

    def lost(self) -> tuple[int, str] | None:
        """A node that was here and whose agent is gone, and how that shows."""
        now = time.monotonic()
        for node, client in list(self.clients.items()):
            if client.closed and not client.left:
                return node, "its agent is gone: the connection ended"
            if now - client.heard > SILENT_S and not client.left:
                return node, f"no beat of its agent for {SILENT_S:.0f} s"
        return None

    def close(self, linger_s: float = 5.0) -> None:
        """Let the others read what they still want to, within a bound."""
        end = time.monotonic() + linger_s
        while time.monotonic() < end and not all(c.closed or c.left for c in list(self.clients.values())):
            time.sleep(0.01)

    def _serve(self, listener: socket.socket) -> None:
        assert self.selector is not None
        while True:
            for key, _ in self.selector.select():
                if key.data is not None:
                    self._answer(key.data)
                    continue
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    connection.settimeout(CONNECT_S)
                    self.selector.register(connection, selectors.EVENT_READ, _Client(connection))

    def _answer(self, client: _Client) -> None:
        """Read what came; answer each whole line. Whoever is no agent of this job is dropped."""
        try:
            data = client.connection.recv(1 << 16)
            if not data:
                raise OSError("end")
            client.heard = time.monotonic()
            client.pending += data
            *lines, client.pending = client.pending.split(b"\n")
            if len(client.pending) > LONGEST:
                raise ValueError("too long")
            for line in lines:
                answer = self._do(request) if (request := self._identified(client, json.loads(line))) else self.identity
                client.connection.sendall(json.dumps([answer]).encode() + b"\n")
        except (OSError, ValueError, TypeError, LookupError):
            assert self.selector is not None
            self.selector.unregister(client.connection)
            client.connection.close()
            client.closed = True

    def _identified(self, client: _Client, request: Any) -> Any:
        """The request of a known agent; None for its first line, which says who it is."""
        if client.node is not None:
            client.left = client.left or request == ["bye"]
            return request
        identity, node = request
        if identity != self.identity:
            raise ValueError("another job")
        client.node = int(node)
        self.clients[client.node] = client  # in the place of the one that it replaces
        return None


class _Client:
    """A connection of the server."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.pending, self.heard = connection, b"", time.monotonic()
        self.node: int | None = None
        self.closed = self.left = False


class RemoteBoard:
    """The other nodes' side: asks node 0, and beats in a thread of its own."""

    def __init__(self, address: str, port: int, identity: str, node: int) -> None:
        """Connect and compare identities.

        Raises:
            OSError: nobody is there, or he is not node 0 of this job.
        """
        self.lock = threading.Lock()
        self.broken = ""
        self.connection = socket.create_connection((address, port), CONNECT_S)
        try:
            self.address: str = self.connection.getpeername()[0]
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.reader = self.connection.makefile("rb")
            self.connection.sendall(json.dumps([identity, node]).encode() + b"\n")
            if self.reader.readline(LONGEST) != json.dumps([identity]).encode() + b"\n":
                raise OSError(f"port {port} belongs to somebody else")
        except OSError:
            self.connection.close()
            raise
        self.connection.settimeout(ANSWER_S)
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def put(self, key: str, value: Any) -> None:
        """As `Board.put`.

        Raises:
            PeerLost: node 0 does not answer; here and below.
        """
        self._ask(["put", key, value])

    def add(self, key: str, number: int) -> int:
        """As `Board.add`."""
        return int(self._ask(["add", key, number]))

    def look(self, *keys: str) -> list[Any]:
        """As `Board.look`."""
        found: list[Any] = self._ask(["look", *keys])
        return found

    def lost(self) -> tuple[int, str] | None:
        """Node 0, when it does not answer."""
        with contextlib.suppress(PeerLost):
            self._ask(["beat"])
        return (0, self.broken) if self.broken else None

    def close(self) -> None:
        """Say good-bye."""
        with contextlib.suppress(PeerLost):
            self._ask(["bye"])
        self.broken = self.broken or "closed"
        self.connection.close()

    def _ask(self, request: list[Any]) -> Any:
        with self.lock:
            if not self.broken:
                try:
                    self.connection.sendall(json.dumps(request).encode() + b"\n")
                    line = self.reader.readline(LONGEST)
                    if line:
                        return json.loads(line)[0]
                    self.broken = "the agent of node 0 is gone: the connection ended"
                except (OSError, ValueError) as error:
                    self.broken = f"the agent of node 0 does not answer: {error}"
                self.connection.close()
            raise PeerLost(self.broken)

    def _beat(self) -> None:
        with contextlib.suppress(PeerLost):
            while True:
                time.sleep(BEAT_S)
                self._ask(["beat"])


def bind(address: str, port: int) -> socket.socket:
    """A listener; on every interface when `address` is empty.

    Raises:
        OSError: the port is taken.
    """
    if not address and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server((address, port), backlog=1024)
