"""The key-value store that the agents of a job share: node 0's agent serves it, the others are its clients.

A message is a line. A connection begins with a greeting, which is compared as bytes: nothing that a stranger sends is
parsed, and an exchange that proves a secret can take the greeting's place. After it, each request is a JSON list and
gets one JSON value.

What the agents write here is up to `trainer.agent.rendezvous`; docs/design.md says why this is not torch's TCPStore.
"""

import asyncio
import contextlib
import json
import math
import resource
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.agent.awake_clock import CLOCK

CONNECT_S = 1.0  # for a client, to connect and to be greeted
GREETING_S = 5.0  # for the server: how long a connection may stay open without a greeting
ANSWER_S = 10.0  # for an answer; if it takes longer, node 0 or the way to it is gone
BEAT_S = 1.0  # each client sends a request at least this often
SILENT_S = 15.0  # without a request a node counts as lost after this time; when its connection ends, at once
SLICE_S = 1.0  # of a wait: between two of them the clock is asked, which stands still while this process does
LEFT, LOST = math.inf, -math.inf  # for an agent that ended as it should, and one that did not
MESSAGE_BYTES = 1 << 20  # at most, in either direction


class PeerLost(RuntimeError):
    """Another node did not answer, or did not come back, within its bound."""


class KeyValueStore:
    """What both sides can do."""

    def __init__(self, identity: str) -> None:
        """`identity`: the same for all agents of a job, and for no others."""
        self.greeting = f"muster {identity} ".encode()
        self.lock = threading.Lock()

    def set(self, key: str, value: Any) -> None:
        """Set a value: anything that JSON can express. Raises PeerLost, as the others do: node 0 does not answer."""
        self._request(["set", key, value])

    def join(self, key: str, *words: str) -> int:
        """Put words into a set, which starts empty, and return how many it has; `get` gives a dict of them."""
        return int(self._request(["join", key, *words]))

    def get(self, *keys: str) -> list[Any]:
        """The values of some keys, None for a key without one."""
        return list(self._request(["get", *keys]))

    def _request(self, request: list[Any]) -> Any:
        raise NotImplementedError


@dataclass
class _Client:
    """What the server knows of an agent."""

    heard: float  # when, last, by `CLOCK`; LEFT or LOST when its connection has ended


class KeyValueServer(KeyValueStore):
    """Node 0's side. It holds the values, and serves them from a thread after `listen`."""

    def __init__(self, identity: str, nodes: int) -> None:
        super().__init__(identity)
        self.nodes = nodes
        self.values: dict[str, Any] = {}
        self.clients: dict[int, _Client] = {}

    def _request(self, request: list[Any]) -> Any:
        with self.lock:
            match request:
                case ["get", *keys]:
                    return [self.values.get(key) for key in keys]
                case ["set", key, value]:
                    self.values[key] = value
                case ["join", key, *words]:
                    self.values[key] = self.values.get(key, {}) | dict.fromkeys(words, True)
                    return len(self.values[key])
                case ["leave"]:
                    pass
                case _:
                    raise ValueError("unknown request")
        return None

    def listen(self, address: str, ports: Sequence[int]) -> int:
        """Serve on the first free port and return it. `address`: as for `bind`. Raises OSError: no port is free."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # node 0 has a connection to every other node
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
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
        for node, heard in [(node, client.heard) for node, client in list(self.clients.items())]:
            if heard == LOST:
                return node, "its agent is gone: the connection ended"
            if CLOCK.now() - heard > SILENT_S:
                return node, f"no beat of its agent for {SILENT_S:.0f} s"
        return None

    def close(self, linger_s: float = 5.0) -> None:
        """Wait, within a bound, until the others have read what they still want to."""
        end = time.monotonic() + linger_s
        while time.monotonic() < end and any(math.isfinite(c.heard) for c in list(self.clients.values())):
            time.sleep(0.01)

    async def _serve(self, listener: socket.socket) -> None:
        async with await asyncio.start_server(self._talk, sock=listener, limit=MESSAGE_BYTES) as server:
            await server.serve_forever()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection. Whatever goes wrong ends this connection and nothing else."""
        client = None
        with contextlib.suppress(Exception):
            client = await asyncio.wait_for(self._greet(reader, writer), GREETING_S)
            while client.heard != LEFT:
                request = json.loads(await reader.readuntil())
                client.heard = LEFT if request == ["leave"] else CLOCK.now()
                writer.write(_line(json.dumps(self._request(request)).encode()))
                await writer.drain()
        if client is not None and client.heard != LEFT:
            client.heard = LOST
        writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Client:
        """Let in an agent of this job, in the place of the one that it may replace."""
        greeting = await reader.readuntil()
        node = int(greeting.removeprefix(self.greeting))
        if not greeting.startswith(self.greeting) or not 0 < node < self.nodes:
            raise ValueError("not an agent of this job")
        self.clients[node] = client = _Client(CLOCK.now())  # first, so that whoever was let in is known
        writer.write(_line(self.greeting))
        return client


class KeyValueClient(KeyValueStore):
    """The other nodes' side. It asks node 0, and a thread of its own sends the beats."""

    def __init__(self, address: str, port: int, identity: str, node: int) -> None:
        """Connect, and check that node 0 of this job answers. Raises OSError: nobody does, or somebody else."""
        super().__init__(identity)
        self.problem = ""
        self.connection = socket.create_connection((address, port), CONNECT_S)
        try:
            self.address: str = self.connection.getpeername()[0]
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._exchange(self.greeting + str(node).encode(), CONNECT_S) != _line(self.greeting):
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
                    return json.loads(self._exchange(json.dumps(request).encode(), ANSWER_S))
                except ConnectionError as error:
                    self.problem = f"the agent of node 0 is gone: {error}"
                except (OSError, ValueError) as error:
                    self.problem = f"the agent of node 0 does not answer: {error}"
                self.connection.close()
            raise PeerLost(self.problem)

    def _exchange(self, message: bytes, bound_s: float) -> bytes:
        """Send a message and wait for the answer, both within one bound; an answer that is too long is cut off."""
        end = CLOCK.now() + bound_s
        self.connection.settimeout(bound_s)
        self.connection.sendall(_line(message))
        answer = b""
        while not answer.endswith(b"\n") and len(answer) <= MESSAGE_BYTES:
            self.connection.settimeout(min(max(end - CLOCK.now(), 0.001), SLICE_S))
            try:
                part = self.connection.recv(1 << 16)
            except TimeoutError:
                if CLOCK.now() < end:
                    continue
                raise
            if not part:
                raise ConnectionError("the connection ended")
            answer += part
        return answer

    def _beat(self) -> None:
        with contextlib.suppress(PeerLost):
            while True:
                time.sleep(BEAT_S)
                self.get()  # of nothing, so that node 0 hears of this agent


def bind(address: str, port: int) -> socket.socket:
    """A listener; on every interface when `address` is empty. Raises OSError: the port is taken."""
    if not address and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server((address, port), backlog=1024)


def _line(message: bytes) -> bytes:
    if len(message) >= MESSAGE_BYTES:
        raise ValueError(f"a message of {len(message)} bytes is too long")
    return message + b"\n"
