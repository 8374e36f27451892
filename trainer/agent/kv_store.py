"""What the agents of a job share: values that all of them see, kept by node 0's agent and pushed to the others.

So nobody asks again and again whether something has changed: reading costs no message, and whoever waits is woken.
`trainer.agent.kv_server` is node 0's side, `trainer.agent.kv_client` that of the others. After the proof
(`trainer.agent.proof`) a message is a line of JSON, at most `MESSAGE_BYTES` long.

What the agents write here is up to `trainer.agent.rendezvous`; docs/design.md says why this is not torch's TCPStore.
"""

import contextlib
import os
import threading
from multiprocessing import connection
from typing import Any

CONNECT_S = 1.0  # for a client, to connect
ANSWER_S = 10.0  # for an answer; if it takes longer, node 0 or the way to it is gone
SLICE_S = 1.0  # of a wait: between two of them the clock is asked, which stands still while this process does
BEAT_S, BEATS = 1.0, 3  # node 0 sends a beat to all so often, which they answer; after so many one is missed, or later
BEATS_PER_S, LONGEST_BEAT_S = 100, 10.0  # with many nodes less often: they must not keep node 0 busy
MESSAGE_BYTES = 1 << 18  # at most, in either direction


def beat_s(nodes: int) -> float:
    """The time between two signs of life of each of so many nodes."""
    return min(max(BEAT_S, nodes / BEATS_PER_S), LONGEST_BEAT_S)


class PeerLost(RuntimeError):
    """Another node did not answer, or did not come back, within its bound."""


class KeyValueStore:
    """What both sides can do."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}  # what all agents see, as far as it is known here
        self.changed = threading.Condition()  # guards the values
        self.wakes = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable when something has changed since `clear`: for those who wait for other things too."""

    def set(self, key: str, value: Any) -> None:
        """Set a value: anything that JSON can express. Raises PeerLost, as the others do: node 0 does not answer."""
        self._request(["set", key, value])

    def add(self, key: str, *words: str) -> None:
        """Put words into a set, which starts empty and is read as a list."""
        self._request(["add", key, *words])

    def tell(self, key: str, value: Any = None) -> None:
        """Leave a value with node 0. When all nodes have, all of them see True for the key."""
        self._request(["tell", key, value])

    def get(self, *keys: str) -> list[Any]:
        """The values of some keys as this node knows them, None for a key without one."""
        with self.changed:
            return [self.values.get(key) for key in keys]

    def check(self) -> None:
        """Raises PeerLost: what this node knows may be old, because node 0 does not answer any more."""

    def wait(self, timeout_s: float) -> None:
        """Wait until something changes, or has since the last wait."""
        connection.wait([self.wakes], timeout_s)
        self.clear()

    def clear(self) -> None:
        """What has changed so far wakes nobody any more; to be called before one looks."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wakes)

    def _request(self, request: list[Any]) -> None:
        raise NotImplementedError

    def _learn(self, news: dict[str, Any]) -> None:
        """Take over what has changed, and wake those who wait."""
        with self.changed:
            self.values.update(news)
        self._wake()

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()
            if self.wakes >= 0:
                os.eventfd_write(self.wakes, 1)

    def _end(self) -> None:
        with self.changed:
            if self.wakes >= 0:
                os.close(self.wakes)
            self.wakes = -1
