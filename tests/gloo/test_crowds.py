"""Agents find node 0 and are let in, whoever else crowds its door or pretends to be it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from agents_peer import JOB, free_port

from trainer.agent.first_contact import find_store
from trainer.agent.kv_server import STRANGERS, KeyValueServer, bind
from trainer.agent.proof import hello, make_nonce
from trainer.agent.strangers import HEARD, Strangers


def wiring(*ports: int) -> Any:
    """Of node 1 of three."""
    return SimpleNamespace(ports=ports, nodes=3, master_addr="127.0.0.1", node_rank=1)


def within(bound_s: float) -> Any:
    """What an agent does between two tries."""
    end = time.monotonic() + bound_s

    def pause(problem: str, pause_s: float) -> None:
        assert time.monotonic() < end, problem
        time.sleep(pause_s)

    return pause


FLOOD = """
import contextlib, socket, sys
held, said = [], False
while True:
    with contextlib.suppress(OSError):
        held.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), 0.2))
        held[-1].sendall(sys.argv[2].encode())
    if len(held) > 150:
        said = said or not print(flush=True)
        held.pop(0).close()
"""


@contextlib.contextmanager
def flood(port: int, says_hello: bool) -> Iterator[None]:
    """Somebody who connects as often as he can."""
    said = hello(1, make_nonce()).decode() + "\n" if says_hello else ""
    with subprocess.Popen([sys.executable, "-Sc", FLOOD, str(port), said], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("says_hello", [False, True])
def test_whoever_connects_without_a_pause_keeps_no_agent_out(says_hello: bool) -> None:
    server = KeyValueServer(JOB, 3)
    port = server.listen(["127.0.0.1"], [free_port()])
    with flood(port, says_hello):
        for _ in range(2):
            find_store(wiring(port), JOB, within(5)).close()
            assert len(server.strangers) <= STRANGERS + 3
    server.close(linger_s=0)


def test_listeners_that_say_nothing_hide_no_node_0() -> None:
    server = KeyValueServer(JOB, 3)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(bind("127.0.0.1", 0)).getsockname()[1] for _ in range(15)]
        port = server.listen(["127.0.0.1"], [free_port()])
        began = time.monotonic()
        find_store(wiring(*silent, port), JOB, within(5)).close()
        assert time.monotonic() - began < 3, "it waited for one after the other"
    server.close(linger_s=0)


class Somebody:
    """A stranger that notes its end."""

    def __init__(self, address: str) -> None:
        self.address, self.ended = address, False

    def end(self) -> None:
        self.ended = True


def come(stack: contextlib.ExitStack, many: int, address: str = "a") -> list[tuple[socket.socket, str]]:
    """As many that have just been accepted, whose other side is still there."""
    pairs = [socket.socketpair() for _ in range(many)]
    return [(stack.enter_context(one), stack.enter_context(other) and address) for one, other in pairs]


def test_each_address_has_its_share_of_the_places_and_chance_decides_within_it() -> None:
    strangers, flooding, agent = Strangers(10), [Somebody("a") for _ in range(1000)], Somebody("b")
    for one in [*flooding[:500], agent, *flooding[500:]]:
        strangers.add(one)
    assert len(strangers) == 10 and not agent.ended
    assert [one.ended for one in flooding].index(False) < 990, "the newest alone are left"
    with contextlib.ExitStack() as stack:
        arrived = [*come(stack, 50), *come(stack, 1, "b")]
        assert (arrived[-1][0], True) in strangers.split(list(arrived))


def test_with_all_places_taken_a_few_of_those_that_come_together_are_heard() -> None:
    strangers = Strangers(10)
    with contextlib.ExitStack() as stack:
        arrived = come(stack, 64)

        def heard(many: int) -> int:
            return sum(is_heard for _, is_heard in strangers.split(arrived[:many]))

        assert (heard(10), heard(64)) == (10, 10)
        for _ in range(10):
            strangers.add(Somebody("a"))
        assert (heard(1), heard(64)) == (1, HEARD)
        assert strangers.end_half() == 5 == len(strangers)


def test_who_has_left_already_is_not_heard() -> None:
    with contextlib.ExitStack() as stack:
        arrived = come(stack, 3)
        one, other = socket.socketpair()
        other.close()
        arrived.append((stack.enter_context(one), "a"))
        assert [is_heard for _, is_heard in Strangers(10).split(arrived)] == [True, True, True, False]
