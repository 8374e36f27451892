"""The key-value store that the agents of a job share: node 0's agent serves it, the others are its clients.

A message is a 4-byte length and that many bytes. A connection begins with a greeting, which is compared as bytes:
nothing that a stranger sends is parsed, and an exchange that proves a secret can take the greeting's place. After it,
each request is a JSON list and gets one JSON value.

Why not torch's TCPStore: in torch 2.13 every operation of a client but `set` waits without bound for a server that does
not answer, and the server serves anybody. What the agents write here is up to `trainer.agent.rendezvous`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

CONNECT_S = 1.0
"""For a client: the time to connect and to be greeted."""
GREETING_S = 5.0
"""For the server: how long a connection may stay open without a greeting."""
ANSWER_S = 10.0
"""For an answer. If it takes longer, node 0 or the way to it is gone."""
BEAT_S = 1.0
"""Each client sends a request at least this often."""
SILENT_S = 15.0
"""A node counts as lost after this time without a request. A connection that ends counts at once."""
GREETING_BYTES = 1024
MESSAGE_BYTES = 1 << 20
LENGTH = struct.Struct("!I")


class PeerLost(RuntimeError):
    """Another node did not answer, or did not come back, within its bound."""


class KeyValueStore:
    """What both sides can do."""

    def set(self, key: str, value: Any) -> None:
        """Set a value: anything that JSON can express.

        Raises:
            PeerLost: node 0 does not answer; the same holds for `add` and `get`.
        """
        self._request(["set", key, value])

    def add(self, key: str, number: int) -> int:
        """Add to a counter, which starts at 0, and return its new value."""
        return int(self._request(["add", key, number]))

    def get(self, *keys: str) -> list[Any]:
        """The values of some keys, None for a key without one."""
        values: list[Any] = self._request(["get", *keys])
        return values

    def _request(self, request: list[Any]) -> Any:
        raise NotImplementedError


@dataclass
class _Client:
    """What the server knows of an agent."""

    heard: float = field(default_factory=time.monotonic)
    closed: bool = False
    left: bool = False


class KeyValueServer(KeyValueStore):
    """Node 0's side. It holds the values, and serves them from a thread after `listen`."""

    def __init__(self, identity: str, nodes: int) -> None:
        """`identity`: the same for all agents of a job, and for no others."""
        self.identity, self.nodes = identity, nodes
        self.values: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.clients: dict[int, _Client] = {}

    def _request(self, request: list[Any]) -> Any:
        operation, *arguments = request
        with self.lock:
            if operation == "get":
                return [self.values.get(key) for key in arguments]
            if operation in ("set", "add"):
                key, value = arguments
                self.values[key] = value if operation == "set" else self.values.get(key, 0) + value
                return self.values[key] if operation == "add" else None
        if operation in ("beat", "leave"):
            return None
        raise ValueError(f"unknown operation {operation}")

    def listen(self, address: str, ports: Sequence[int]) -> int:
        """Serve on the first free port of `ports` and return it. An empty `address` means every interface.

        Raises:
            OSError: no port is free.
        """
        _raise_file_limit()
        refused = []
        for port in ports:
            try:
                listener = bind(address, port)
            except OSError as error:
                refused.append(f"{port}: {error.strerror}")
                continue
            threading.Thread(target=asyncio.run, args=[self._serve(listener)], name="kv-store", daemon=True).start()
            return port
        raise OSError(f"port: none of {len(refused)} candidates could be bound: {'; '.join(refused[:3])} ...")

    def lost(self) -> tuple[int, str] | None:
        """A node whose connection ended, or that has been silent for too long."""
        now = time.monotonic()
        for node, client in list(self.clients.items()):
            if client.closed and not client.left:
                return node, "its agent is gone: the connection ended"
            if now - client.heard > SILENT_S and not client.left:
                return node, f"no beat of its agent for {SILENT_S:.0f} s"
        return None

    def close(self, linger_s: float = 5.0) -> None:
        """Wait, within a bound, until the others have read what they still want to."""
        end = time.monotonic() + linger_s
        while time.monotonic() < end and not all(c.closed or c.left for c in list(self.clients.values())):
            time.sleep(0.01)

    async def _serve(self, listener: socket.socket) -> None:
        async with await asyncio.start_server(self._talk, sock=listener) as server:
            await server.serve_forever()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection. Whatever goes wrong ends this connection and nothing else."""
        client = None
        with contextlib.suppress(Exception):
            client = await asyncio.wait_for(self._greet(reader, writer), GREETING_S)
            while True:
                request = json.loads(await _read(reader, MESSAGE_BYTES))
                client.heard = time.monotonic()
                client.left = client.left or request == ["leave"]
                writer.write(_message(json.dumps(self._request(request)).encode()))
                await writer.drain()
        if client is not None:
            client.closed = True
        writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Client:
        """Let in an agent of this job, in the place of the one that it may replace."""
        greeting, expected = await _read(reader, GREETING_BYTES), _greeting(self.identity)
        node = int(greeting.removeprefix(expected))
        if not greeting.startswith(expected) or not 0 < node < self.nodes:
            raise ValueError("not an agent of this job")
        self.clients[node] = client = _Client()  # first, so that whoever was let in is known
        writer.write(_message(expected))
        return client


class KeyValueClient(KeyValueStore):
    """The other nodes' side. It asks node 0, and a thread of its own sends the beats."""

    def __init__(self, address: str, port: int, identity: str, node: int) -> None:
        """Connect, and check that node 0 of this job answers.

        Raises:
            OSError: nobody listens there, or somebody else does.
        """
        self.lock = threading.Lock()
        self.problem = ""
        self.connection = socket.create_connection((address, port), CONNECT_S)
        try:
            self.address: str = self.connection.getpeername()[0]
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            greeting = _greeting(identity)
            if self._exchange(greeting + str(node).encode(), GREETING_BYTES, CONNECT_S) != greeting:
                raise OSError(f"port {port} belongs to somebody else")
        except OSError:
            self.connection.close()
            raise
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def lost(self) -> tuple[int, str] | None:
        """Node 0, when it does not answer."""
        return (0, self.problem) if self.problem else None

    def close(self) -> None:
        """Tell node 0 that this agent leaves as it should."""
        with contextlib.suppress(PeerLost):
            self._request(["leave"])
        self.problem = self.problem or "closed"
        self.connection.close()

    def _request(self, request: list[Any]) -> Any:
        with self.lock:
            if not self.problem:
                try:
                    return json.loads(self._exchange(json.dumps(request).encode(), MESSAGE_BYTES, ANSWER_S))
                except ConnectionError as error:
                    self.problem = f"the agent of node 0 is gone: {error}"
                except (OSError, ValueError) as error:
                    self.problem = f"the agent of node 0 does not answer: {error}"
                self.connection.close()
            raise PeerLost(self.problem)

    def _exchange(self, body: bytes, limit: int, bound_s: float) -> bytes:
        """Send a message and wait for the answer, both within one bound."""
        end = time.monotonic() + bound_s
        self.connection.settimeout(bound_s)
        self.connection.sendall(_message(body))
        return self._receive(_length(self._receive(LENGTH.size, end), limit), end)

    def _receive(self, count: int, end: float) -> bytes:
        data = b""
        while len(data) < count:
            self.connection.settimeout(max(end - time.monotonic(), 0.001))
            part = self.connection.recv(count - len(data))
            if not part:
                raise ConnectionError("the connection ended")
            data += part
        return data

    def _beat(self) -> None:
        with contextlib.suppress(PeerLost):
            while True:
                time.sleep(BEAT_S)
                self._request(["beat"])


def bind(address: str, port: int) -> socket.socket:
    """A listener; on every interface when `address` is empty.

    Raises:
        OSError: the port is taken.
    """
    if not address and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server((address, port), backlog=1024)


def _greeting(identity: str) -> bytes:
    """How either side of a job's store begins; a client adds the number of its node."""
    return f"muster {identity} ".encode()


def _message(body: bytes) -> bytes:
    if len(body) > MESSAGE_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is too long")
    return LENGTH.pack(len(body)) + body


def _length(head: bytes, limit: int) -> int:
    [length] = LENGTH.unpack(head)
    if length > limit:
        raise OSError("somebody else, or a message that is too long")
    return int(length)


async def _read(reader: asyncio.StreamReader, limit: int) -> bytes:
    return await reader.readexactly(_length(await reader.readexactly(LENGTH.size), limit))


def _raise_file_limit() -> None:
    """Allow as many open files as the system lets us: node 0 has a connection to every other node."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
