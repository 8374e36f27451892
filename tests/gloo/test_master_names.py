"""The master's name, as a cluster's DNS has it: late, still leading to a host that is gone, or never there."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from stopwatch import Stopwatch

from trainer.agent import first_contact, rendezvous
from trainer.agent.rendezvous import NodeRendezvous
from trainer.agent.rounds import Ended, RendezvousTimeoutError
from trainer.wiring.network import candidate_ports
from trainer.wiring.node import Wiring

NAME = "digits-0.digits"
SECRET = b"0123456789abcdef" * 4
real = socket.getaddrinfo
JOBS: dict[int, str] = {}  # a job for each list of what its agents say
KEPT: list[list[str]] = []  # so that no two lists have one id


class Resolver:
    """What the name resolves to, at each moment."""

    def __init__(self) -> None:
        self.address: str | None = None
        self.asked = 0

    def __call__(self, host: Any, *words: Any, **options: Any) -> Any:
        if host != NAME:
            return real(host, *words, **options)
        self.asked += 1
        if self.address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(self.address, *words, **options)


multiprocessing.set_forkserver_preload(["torch.distributed", "trainer.agent.rank_store"])


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    found = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", found)
    return found


def meet(node: int, bound_s: float, said: list[str]) -> NodeRendezvous:
    job = JOBS.setdefault(id(said), f"names-{os.getpid()}-{len(JOBS)}")
    KEPT.append(said)
    ports = tuple(candidate_ports(job))
    wiring = Wiring("kubernetes", job, 0, 2, node, (NAME, "digits-1.digits"), NAME, ports, 1, None, 1, None, "", {})
    return NodeRendezvous(wiring, SECRET, bound_s, bound_s, lambda: False, lambda number, failures: 0, said.append)


@pytest.fixture
def master() -> Iterator[tuple[NodeRendezvous, list[str]]]:
    """Node 0, waiting for node 1 on all interfaces of this host."""
    said: list[str] = []
    found = meet(0, 60, said)
    thread = threading.Thread(target=found.next_round, daemon=True)
    thread.start()
    while found.store is None:
        time.sleep(0.01)
    yield found, said
    thread.join(60)
    found.shutdown()


def test_a_name_that_comes_late_is_looked_up_again(resolver: Resolver, master: Any, stopwatch: Stopwatch) -> None:
    threading.Timer(1, lambda: setattr(resolver, "address", "127.0.0.1")).start()
    start = time.monotonic()
    node = meet(1, 60, master[1])
    node.next_round()
    stopwatch.check(time.monotonic() - start, 3)
    assert node.master_addr() == "127.0.0.1"
    node.shutdown()


def test_a_name_that_leads_to_a_host_that_is_gone_is_looked_up_again(
    resolver: Resolver, master: Any, monkeypatch: pytest.MonkeyPatch, stopwatch: Stopwatch
) -> None:
    """Packets to an address without a host are lost: one try costs the bound of a connection, not one for each port."""
    connect, tries = socket.create_connection, []

    def connect_or_wait(target: tuple[str, int], timeout: float) -> socket.socket:
        if resolver.address == "gone":
            tries.append(target)
            time.sleep(timeout)
            raise TimeoutError("timed out")
        return connect(target, timeout)

    monkeypatch.setattr(socket, "create_connection", connect_or_wait)
    resolver.address = "gone"
    threading.Timer(2.5, lambda: setattr(resolver, "address", "127.0.0.1")).start()
    start = time.monotonic()
    node = meet(1, 60, master[1])
    node.next_round()
    stopwatch.check(time.monotonic() - start, 5)
    assert len(tries) == 3
    assert node.master_addr() == "127.0.0.1"
    node.shutdown()


def test_a_foreign_listener_that_never_answers_is_passed_by(resolver: Resolver) -> None:
    said: list[str] = []
    node = meet(1, 60, said)
    with socket.create_server(("127.0.0.1", node.wiring.ports[0])):
        found = meet(0, 60, said)
        thread = threading.Thread(target=found.next_round, daemon=True)
        thread.start()
        resolver.address = "127.0.0.1"
        node.next_round()
        thread.join(10)
        node.shutdown()
        found.shutdown()


def test_the_masters_own_ranks_need_no_name(resolver: Resolver, master: Any) -> None:
    resolver.address = "127.0.0.1"
    node = meet(1, 60, master[1])
    node.next_round()
    for address in (None, "127.0.0.5", "192.0.2.1"):
        resolver.address = address
        assert master[0].master_addr() == "127.0.0.1", "where the other came to"
    node.shutdown()


def test_agents_that_know_the_master_by_another_address_reach_it_after_a_while(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_contact, "listening_addresses", lambda name: (["127.0.0.1"], ""))
    monkeypatch.setattr(rendezvous, "WIDEN_S", 0.5)
    resolver.address = "127.0.0.2"
    said: list[str] = []
    both = [meet(node, 60, said) for node in range(2)]
    threads = [threading.Thread(target=node.next_round, daemon=True) for node in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [node.master_addr() for node in both] == ["127.0.0.2"] * 2
    assert any("listen on all interfaces now" in text for text in said)
    for node in reversed(both):
        node.shutdown()


def test_a_name_that_never_comes_is_named_within_its_bound(resolver: Resolver, stopwatch: Stopwatch) -> None:
    said: list[str] = []
    with (
        stopwatch.at_most(3),
        pytest.raises(RendezvousTimeoutError, match=rf"no master at {NAME} within 1 s: the name does not resolve"),
    ):
        meet(1, 1, said).next_round()


def test_progress_is_said_while_the_name_is_awaited(resolver: Resolver) -> None:
    said: list[str] = []
    with pytest.raises(RendezvousTimeoutError):
        meet(1, 6, said).next_round()
    assert any(NAME in text and "does not resolve" in text and "s left" in text for text in said)


def test_a_stop_request_ends_the_wait(resolver: Resolver) -> None:
    node = meet(1, 60, [])
    node.interrupted = lambda: resolver.asked > 3
    with pytest.raises(Ended) as caught:
        node.next_round()
    assert caught.value.code == 75
