"""Node 0's side of what the agents share: it keeps the values, lets in the other agents, and misses them.

Whatever a connection brings, it ends that connection and nothing else: before the proof a few bytes within a few
seconds, after it whole messages. Nobody is waited for: what a peer does not read is dropped with it.
"""

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.agent.awake_clock import CLOCK
from trainer.agent.kv_store import BEATS, MESSAGE_BYTES, KeyValueStore, beat_s
from trainer.agent.proof import (
    PROOF_BYTES,
    Membership,
    Seal,
    check_proof,
    make_nonce,
    parse_hello,
    prove,
)
from trainer.agent.strangers import Strangers, turn_away

PROOF_S = 5.0  # how long a connection may stay open without a proof, where nobody else is in the way
PROOFS_PER_S = 200  # what node 0 can do at least, when all come at once
STRANGERS = 64  # connections without a proof, beside one of each node
SILENT_S = 15.0  # a node that says nothing counts as lost after this time; when its connection ends, at once
UNREAD_BYTES = 4 * MESSAGE_BYTES  # that a peer may leave unread
KEYS, CHARS = 50, 100  # that other agents may use, and of each key and word: far more than they have a use for
ANYBODYS = ("stop", "end")  # the values that every agent may set; the rest are node 0's
LEFT, LOST = math.inf, -math.inf  # for an agent that ended as it should, and one that did not
BACKLOG = 4096  # connections that the kernel holds until they are accepted
ACCEPTED = 64  # of them at once, between which those that are here are served
FULL_S = 0.2  # before the next try when no file can be opened, and no stranger has one


@dataclass
class _Client:
    """What the server knows of an agent."""

    heard: float  # when, last, by `CLOCK`; LEFT or LOST when its connection has ended
    address: str  # of this host, where it has come to


class KeyValueServer(KeyValueStore):
    """It holds the values, and serves them from a thread after `listen`."""

    def __init__(self, membership: Membership, nodes: int) -> None:
        super().__init__()
        self.membership, self.nodes = membership, nodes
        self.told: dict[str, dict[int, Any]] = {}  # by key and node
        self.clients: dict[int, _Client] = {}
        self.strangers = Strangers(STRANGERS + nodes)  # who has not proven anything yet
        self.peers: set[_Connection] = set()
        self.dirty: set[str] = set()  # what the peers have not been sent yet
        self.loop: asyncio.AbstractEventLoop | None = None

    def listen(self, addresses: Sequence[str], ports: Sequence[int]) -> int:
        """Serve on the first port that is free at all addresses, and return it. Raises OSError: no port is.

        `addresses`: as for `bind`. May be called again, for others.
        """
        refused = []
        for port in ports:
            listeners: list[socket.socket] = []
            try:
                listeners += (bind(address, port) for address in addresses)
            except OSError as error:
                refused.append(f"{port}: {error.strerror}")
                for listener in listeners:
                    listener.close()
                continue
            self._serve(listeners)
            return port
        raise OSError(f"port: none of {len(refused)} candidates could be bound: {'; '.join(refused[:3])} ...")

    def _serve(self, listeners: list[socket.socket]) -> None:
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            self.loop.call_later(beat_s(self.nodes), self._beat, self.loop)
            threading.Thread(target=self.loop.run_forever, name="kv-store", daemon=True).start()
        for listener in listeners:
            listener.setblocking(False)
            self.loop.call_soon_threadsafe(self.loop.add_reader, listener, self._accept, self.loop, listener)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ask all for a sign of life; their answers come together, which costs less than one by one."""
        for peer in list(self.peers):
            peer.send(False, {})
        loop.call_later(beat_s(self.nodes), self._beat, loop)

    def _accept(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        arrived: list[tuple[socket.socket, str]] = []
        try:
            while len(arrived) < ACCEPTED:
                accepted, (address, *_) = listener.accept()
                arrived.append((accepted, address))
        except (BlockingIOError, ConnectionError):
            pass  # nobody more, or somebody left again
        except OSError:  # too many files are open
            if not arrived and not self.strangers.end_half():
                loop.remove_reader(listener)
                loop.call_later(FULL_S, loop.add_reader, listener, self._accept, loop, listener)
        for accepted, is_heard in self.strangers.split(arrived):
            if is_heard:
                loop.create_task(self._welcome(loop, accepted))
            else:
                turn_away(accepted)

    async def _welcome(self, loop: asyncio.AbstractEventLoop, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it left again
            await loop.connect_accepted_socket(lambda: _Connection(self), accepted)

    def reached(self) -> str:
        """The address of this host where the other agents have come to; empty when there are several, or none yet."""
        addresses = {client.address for client in list(self.clients.values())}
        return addresses.pop() if len(addresses) == 1 else ""

    def lost(self) -> tuple[int, str] | None:
        """A node whose connection ended, or that has been silent for too long."""
        now, silent_s = CLOCK.now(), max(SILENT_S, BEATS * beat_s(self.nodes))
        for node, client in list(self.clients.items()):
            if client.heard == LOST:
                return node, "its agent is gone: the connection ended"
            if now - client.heard > silent_s:
                return node, f"no beat of its agent for {silent_s:.0f} s"
        return None

    def close(self, linger_s: float = 5.0) -> None:
        """Wait, within a bound, until the others have left."""
        end = time.monotonic() + linger_s
        while time.monotonic() < end and any(math.isfinite(c.heard) for c in list(self.clients.values())):
            time.sleep(0.01)

    def forget(self, number: int) -> None:
        """Drop what belongs to rounds before this one: keys that begin with a lower number."""
        with self.changed:
            for kept in (self.values, self.told):
                for key in list(kept):
                    first = key.partition("/")[0]
                    if first.isdecimal() and int(first) < number:
                        del kept[key]

    def _request(self, request: list[Any]) -> None:
        self.apply(0, request)
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.push)

    def apply(self, node: int, request: Any) -> dict[str, Any]:
        """Do what a node asks for, and return what it should know then. Raises ValueError: it makes no sense."""
        with self.changed:
            match request:
                case ["set", str(key), value] if not node or (key in ANYBODYS and _is_flat(value)):
                    self._change(node, key, value)
                case ["add", str(key), *words] if all(isinstance(word, str) and len(word) <= CHARS for word in words):
                    self._change(node, key, list(dict.fromkeys([*self.values.get(key, []), *words])))
                case ["tell", str(key), value]:
                    self._check_room(node, self.told, key)
                    told = self.told.setdefault(key, {})
                    told[node] = value
                    if len(told) == self.nodes:
                        self._change(node, key, True)
                    self._wake()
                case ["leave"]:
                    return {}
                case _:
                    raise ValueError("unknown request")
            return {key: self.values[key]} if key in self.values else {}

    def _change(self, node: int, key: str, value: Any) -> None:
        self._check_room(node, self.values, key)
        if self.values.get(key) == value:
            return
        if node and len(json.dumps(self.values | {key: value})) > MESSAGE_BYTES // 2:
            raise ValueError("too much")  # for one message, and the other half is node 0's own
        self.values[key] = value
        self.dirty.add(key)
        self._wake()

    def _check_room(self, node: int, kept: dict[str, Any], key: str) -> None:
        is_of_round = "/" in key and len(key) <= CHARS and len(kept) < KEYS
        if node and key not in kept and key not in ANYBODYS and not is_of_round:
            raise ValueError("no room for that key")

    def push(self) -> None:
        """Send every peer what has changed; in the thread that serves."""
        with self.changed:
            news = {key: self.values[key] for key in self.dirty if key in self.values}
            self.dirty.clear()
        if news:
            for peer in list(self.peers):
                peer.send(False, news)


class _Connection(asyncio.Protocol):
    """One connection: of a stranger, which must prove that it is an agent of this run, then of that agent."""

    def __init__(self, server: KeyValueServer) -> None:
        self.server, self.buffer, self.node = server, bytearray(), 0
        self.client: _Client | None = None  # once it has proven itself
        self.key: bytes | None = None  # once it has said which node it wants to be

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.address = transport, (transport.get_extra_info("peername") or ("",))[0]
        bound_s = PROOF_S + self.server.nodes / PROOFS_PER_S
        self.too_late = asyncio.get_running_loop().call_later(bound_s, self.end)
        self.server.strangers.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self.buffer += data
            while b"\n" in data:
                line, _, rest = self.buffer.partition(b"\n")
                self._check_length(line)
                self.buffer = rest
                self._handle(bytes(line))
                data = bytes(rest)
            self._check_length(self.buffer)
        except Exception:  # of whatever kind: nobody but the sender is to blame
            self.end()

    def connection_lost(self, error: Exception | None) -> None:
        self.too_late.cancel()
        self.server.strangers.discard(self)
        self.server.peers.discard(self)
        if self.client is not None and self.client.heard != LEFT:
            self.client.heard = LOST
            self.server._wake()

    def end(self) -> None:
        """End this connection at once."""
        self.server.strangers.discard(self)
        self.transport.abort()

    def send(self, is_answer: bool, news: dict[str, Any]) -> None:
        """Send what has changed, unless the peer has left too much unread."""
        if self.transport.get_write_buffer_size() > UNREAD_BYTES:
            self.transport.abort()
        elif not self.transport.is_closing():
            self.transport.write(self.sends.close(json.dumps([is_answer, news]).encode()))

    def _check_length(self, line: bytearray) -> None:
        if len(line) > (MESSAGE_BYTES if self.client else PROOF_BYTES):
            raise ValueError("too long")

    def _handle(self, line: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.client is not None:
            request = json.loads(self.receives.open(line))
            self.client.heard = LEFT if request == ["leave"] else CLOCK.now()
            if request == ["beat"]:
                return
            news = self.server.apply(self.node, request)
            self.server.push()
            self.send(True, news)
        elif self.key is None:
            self.node, nonce = parse_hello(line, self.server.nodes)
            own, port = make_nonce(), self.transport.get_extra_info("sockname")[1]
            self.key = self.server.membership.key(self.node, port, nonce, own)
            self.transport.write(own + b" " + prove(self.key, b"server") + b"\n")
        else:
            check_proof(self.key, b"client", line)
            self._let_in(self.key)

    def _let_in(self, key: bytes) -> None:
        """From here on it is an agent of this run, in the place of the one that it may replace."""
        server = self.server
        self.too_late.cancel()
        server.strangers.discard(self)
        self.sends, self.receives = Seal(key, b"server"), Seal(key, b"client")
        address = self.transport.get_extra_info("sockname")[0].removeprefix("::ffff:")
        server.clients[self.node] = self.client = _Client(CLOCK.now(), address)
        server.peers.add(self)
        self.send(True, dict(zip(server.values, server.get(*server.values), strict=False)))


def _is_flat(value: Any) -> bool:
    """Whether a value nests nothing: whoever reads it can."""
    return all(isinstance(item, (str, int, bool)) for item in (value if isinstance(value, list) else [value]))


def bind(address: str, port: int) -> socket.socket:
    """A listener; on every interface when `address` is empty. Raises OSError: the port is taken."""
    if not address and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    target = socket.getaddrinfo(address, port, family)[0][4] if address else ("", port)  # with the scope, if it has one
    return socket.create_server(target, family=family, backlog=BACKLOG)
