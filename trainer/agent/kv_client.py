"""The other nodes' side of what the agents share: it knows what node 0 has pushed, and asks for changes.

A thread reads what comes, and answers each beat of node 0, so that both know that the other lives.
"""

import contextlib
import json
import socket
import threading
from typing import Any

from trainer.agent.awake_clock import CLOCK
from trainer.agent.kv_store import ANSWER_S, BEATS, CONNECT_S, MESSAGE_BYTES, SLICE_S, KeyValueStore, PeerLost, beat_s
from trainer.agent.proof import (
    PROOF_BYTES,
    Membership,
    NotProvenError,
    Seal,
    check_proof,
    hello,
    make_nonce,
    parse_answer,
    prove,
)


class SilentError(TimeoutError):
    """Somebody listens there, and does not say what is expected in time."""


class KeyValueClient(KeyValueStore):
    """A connection to node 0."""

    def __init__(
        self, connection: socket.socket, membership: Membership, node: int, nodes: int = 2, proof_s: float = CONNECT_S
    ) -> None:
        """Let both sides prove that they belong to the run, each step within `proof_s`.

        Raises OSError: somebody else listens there, or is too slow; then the connection is closed.
        """
        super().__init__()
        self.connection = connection
        self.problem, self.buffer = "", bytearray()
        self.requests, self.answers, self.asking, self.sending = 0, 0, threading.Lock(), threading.Lock()
        self.silent_s, self.heard = max(ANSWER_S, BEATS * beat_s(nodes)), CLOCK.now()
        try:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.address, port = self.connection.getpeername()[:2]
            self._prove(membership, node, port, proof_s)
        except OSError:
            self.connection.close()
            self._end()
            raise
        threading.Thread(target=self._read, name="kv-client", daemon=True).start()

    def _prove(self, membership: Membership, node: int, port: int, bound_s: float) -> None:
        """Nothing is said that would help a listener which has not proven itself."""
        nonce, end = make_nonce(), CLOCK.now() + bound_s
        self.connection.settimeout(bound_s)
        self.connection.sendall(hello(node, nonce) + b"\n")
        theirs, proof = parse_answer(self._read_line(PROOF_BYTES, end))
        key = membership.key(node, port, nonce, theirs)
        check_proof(key, b"server", proof)
        self.sends, self.receives = Seal(key, b"client"), Seal(key, b"server")
        self.connection.sendall(prove(key, b"client") + b"\n")
        self._take(self._read_line(MESSAGE_BYTES, end + bound_s))  # all that is known so far
        self.connection.settimeout(ANSWER_S)

    def lost(self) -> tuple[int, str] | None:
        """Node 0, when it does not answer."""
        if not self.problem and CLOCK.now() - self.heard > self.silent_s:
            self._give_up(f"the agent of node 0 does not answer: nothing for {self.silent_s:.0f} s")
        return (0, self.problem) if self.problem else None

    def check(self) -> None:
        if self.lost():
            raise PeerLost(self.problem)

    def close(self) -> None:
        """Tell node 0 that this agent leaves as it should."""
        with contextlib.suppress(PeerLost):
            self._request(["leave"])
        self._give_up("closed")
        self._end()

    def _request(self, request: list[Any]) -> None:
        with self.asking:
            self.check()
            try:
                self.requests += 1
                self._send(request)
            except OSError as error:
                self._give_up(f"the agent of node 0 is gone: {error}")
            end = CLOCK.now() + ANSWER_S
            with self.changed:
                while self.answers <= self.requests and not self.problem and (left := end - CLOCK.now()) > 0:
                    self.changed.wait(min(left, SLICE_S))
            if self.answers <= self.requests:
                self._give_up(f"the agent of node 0 does not answer: nothing for {ANSWER_S:.0f} s")
                self.check()

    def _send(self, request: list[Any]) -> None:
        with self.sending:
            self.connection.sendall(self.sends.close(json.dumps(request).encode()))

    def _give_up(self, problem: str) -> None:
        with self.changed:
            self.problem = self.problem or problem
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
        self.connection.close()
        self._wake()

    def _read(self) -> None:
        try:
            while not self.problem:
                self._take(self._read_line(MESSAGE_BYTES))
        except Exception as error:  # of whatever kind: it must be noticed
            self._give_up(f"the agent of node 0 is gone: {error}")

    def _take(self, line: bytes) -> None:
        is_answer, news = json.loads(self.receives.open(line))
        self.heard = CLOCK.now()
        if not is_answer and not news:
            self._send(["beat"])
            return
        with self.changed:
            self.answers += is_answer
        self._learn(news)

    def _read_line(self, limit: int, end: float | None = None) -> bytes:
        """The next line that node 0 sends, until `end` of the clock."""
        while (length := self.buffer.find(b"\n")) < 0:
            if len(self.buffer) > limit:
                raise NotProvenError("somebody else listens there")
            if end is not None:
                self.connection.settimeout(min(max(end - CLOCK.now(), 0.001), SLICE_S))
            try:
                part = self.connection.recv(1 << 16)
            except TimeoutError:
                if end is None or CLOCK.now() < end:
                    continue
                raise SilentError("no answer") from None
            if not part:
                raise ConnectionError("the connection ended")
            self.buffer += part
        line = bytes(self.buffer[:length])
        del self.buffer[: length + 1]
        return line
