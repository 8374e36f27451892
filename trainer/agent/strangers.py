"""Whom node 0 hears out when more come than it has places for: nobody can tell yet which of them are agents.

Whoever floods it comes from few addresses, so each address gets its share. Among those of one address chance decides,
because agents may have the address of the flood: the oldest would always be an agent that waits for its answer, and the
newest one that has just come. An agent that has no luck tries again.
"""

import random
import select
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

HEARD = 2  # of those that come together when all places are taken; each ends another one
RESET = struct.pack("ii", 1, 0)  # for SO_LINGER: the kernel keeps nothing of a connection that is closed


class Stranger(Protocol):
    """A connection of somebody who has not proven anything yet."""

    address: str

    def end(self) -> None:
        """End it at once."""


class Strangers:
    """All of them, within a limit."""

    def __init__(self, places: int) -> None:
        self.places, self.all = places, dict[Stranger, None]()

    def __len__(self) -> int:
        return len(self.all)

    def add(self, stranger: Stranger) -> None:
        """Give a place to somebody, if need be that of another one."""
        while len(self.all) >= self.places:
            self._end_one()
        self.all[stranger] = None

    def discard(self, stranger: Stranger) -> None:
        """It is none any more."""
        self.all.pop(stranger, None)

    def end_half(self) -> int:
        """Make room, and say for how many."""
        half = (len(self.all) + 1) // 2
        for _ in range(half):
            self._end_one()
        return half

    def split(self, arrived: list[tuple[socket.socket, str]]) -> Iterator[tuple[socket.socket, bool]]:
        """Say of each of those that have come, with its address, whether it is heard.

        Turning somebody away costs a tenth of hearing him, so a flood ends here instead of in front of the door.
        """
        left = _have_left([one for one, _ in arrived]) if len(arrived) > HEARD else set()
        heard = max(self.places - len(self.all), HEARD)
        if len(arrived) - len(left) > heard:
            here = Counter(stranger.address for stranger in self.all)
            random.shuffle(arrived)
            arrived.sort(key=lambda one: here[one[1]])
        for one, _ in arrived:
            is_heard = heard > 0 and one.fileno() not in left
            heard -= is_heard
            yield one, is_heard

    def _end_one(self) -> None:
        counts = Counter(stranger.address for stranger in self.all)
        most = max(counts.values())
        ended = random.choice([stranger for stranger in self.all if counts[stranger.address] == most])
        self.discard(ended)
        ended.end()


def turn_away(connection: socket.socket) -> None:
    """End a connection that nobody has read from."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def _have_left(connections: list[socket.socket]) -> set[int]:
    """The files of those whose other side is gone already."""
    door = select.poll()
    for connection in connections:
        door.register(connection, select.POLLRDHUP)
    return {file for file, _ in door.poll(0)}
