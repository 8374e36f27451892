"""How two agents prove to each other that they know the run's secret, before either parses what the other says.

A client says which node it is, and a number that it has made up:  muster 1 <node> <nonce>
The server proves itself, with a number of its own:                <nonce> <proof>
The client proves itself:                                          <proof>

Each proof is an HMAC over the run, the node, the port and both numbers, with a role of its own. So neither can be sent
back, used again, or passed on by a listener on another port. From the same follows the key of the session, which marks
every line after that: one that was made up, changed, repeated or left out on the way is not parsed. Nothing is
encrypted.
"""

import hmac
import json
import re
import secrets
from dataclasses import dataclass, field

PROOF_BYTES = 200
"""No line of a proof is longer."""
HELLO = re.compile(rb"muster 1 ([0-9]{1,7}) ([0-9a-f]{64})")
ANSWER = re.compile(rb"([0-9a-f]{64}) ([0-9a-f]{64})")


class NotProvenError(OSError):
    """The other side has not proven that it belongs to this run."""


@dataclass(frozen=True)
class Membership:
    """What the agents of one launch of a run have in common."""

    launch: str
    secret: bytes = field(repr=False)

    def key(self, node: int, port: int, client_nonce: bytes, server_nonce: bytes) -> bytes:
        """The key of one session."""
        facts = json.dumps([self.launch, node, port, client_nonce.decode(), server_nonce.decode()])
        return hmac.digest(self.secret, facts.encode(), "sha256")


def make_nonce() -> bytes:
    """A number that was never used before."""
    return secrets.token_hex(32).encode()


def hello(node: int, nonce: bytes) -> bytes:
    """What a client says first."""
    return b"muster 1 %d %s" % (node, nonce)


def parse_hello(line: bytes, nodes: int) -> tuple[int, bytes]:
    """The node and its nonce. Raises NotProvenError: not one of the other `nodes`."""
    found = HELLO.fullmatch(line)
    if not found or not 0 < int(found[1]) < nodes:
        raise NotProvenError("not an agent of this run")
    return int(found[1]), found[2]


def parse_answer(line: bytes) -> tuple[bytes, bytes]:
    """The server's nonce and its proof. Raises NotProvenError: something else."""
    found = ANSWER.fullmatch(line)
    if not found:
        raise NotProvenError("somebody else listens there")
    return found[1], found[2]


def prove(key: bytes, role: bytes) -> bytes:
    """The proof of one side."""
    return hmac.digest(key, b"proof " + role, "sha256").hex().encode()


def check_proof(key: bytes, role: bytes, proof: bytes) -> None:
    """Raises NotProvenError: the other side does not know the secret."""
    if not hmac.compare_digest(prove(key, role), proof):
        raise NotProvenError("who listens there does not know this run's secret")


class Seal:
    """Marks the lines that one side sends, in their order."""

    def __init__(self, key: bytes, role: bytes) -> None:
        self.key, self.count = hmac.digest(key, b"lines " + role, "sha256"), 0

    def close(self, message: bytes) -> bytes:
        """The line that carries a message."""
        return b"%s %s\n" % (self._next_mark(message), message)

    def open(self, line: bytes) -> bytes:
        """The message in the next line. Raises NotProvenError: the other side did not send it so."""
        mark, _, message = line.partition(b" ")
        if not hmac.compare_digest(self._next_mark(message), mark):
            raise NotProvenError("a line that the other side did not send")
        return message

    def _next_mark(self, message: bytes) -> bytes:
        self.count += 1
        return hmac.digest(self.key, b"%d %s" % (self.count, message), "sha256").hex().encode()
