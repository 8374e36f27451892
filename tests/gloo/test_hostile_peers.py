"""What node 0's agent survives: strangers, broken agents, whoever reads nothing or says nothing."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time

import pytest
from agents_peer import JOB, Peer, connect, ended
from muster_runs import wait_for

from trainer.agent import kv_server, kv_store
from trainer.agent.kv_server import KeyValueServer, bind
from trainer.agent.proof import Membership, NotProvenError, parse_hello

STRANGE = [
    b"[" * 5_000_000,
    b"[" * 50_000 + b"\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\xff\xff\xff\xff" + b"x" * 100_000,
    b"muster digits-1/0 2\n",
    b"muster 1 1e999 " + b"0" * 64 + b"\n",
    b"muster 1 999 " + b"0" * 64 + b"\n",
    b"muster 1 0 " + b"0" * 64 + b"\n",
    b"muster 1 " + b"1" * 5000,
    b"muster 1 2 " + b"0" * 64 + b"\n" + b"0" * 64 + b"\n",
    b"muster 1 2 " + b"0" * 64 + b"\n" + b'["set", "stop", true]\n' * 10,
]


@pytest.mark.parametrize("data", STRANGE, ids=lambda data: repr(data[:30]) + str(len(data)))
def test_whatever_a_stranger_sends_ends_its_own_connection_alone(
    served: tuple[KeyValueServer, int], data: bytes
) -> None:
    server, port = served
    agent = connect(port)
    with socket.create_connection(("127.0.0.1", port), 4) as stranger:
        with contextlib.suppress(ConnectionError):  # it may be thrown out before it has sent everything
            stranger.sendall(data)
        assert ended(stranger), "before its time is up"
    agent.add("1/words", "x")
    assert list(server.clients) == [1] and server.values == {"1/words": ["x"]}
    agent.close()


NONSENSE = [
    b"[" * 50_000,
    b"\xff\xfe",
    b"7",
    b"[]",
    b'["set", [], 1]',
    b'["set", "stop", ' + b"[" * 500 + b"]" * 500 + b"]",
    b'["set", "plan", {}]',
    b'["add", "plan", "x"]',
    b'["add", "1/words", []]',
    json.dumps(["add", "1/words", *(str(number) for number in range(30_000))]).encode(),
    b'["tell", "' + b"x" * 1000 + b'/", 1]',
    b'["set", "stop"]',
    b'["format", "disk"]',
    b'["set", "stop", "' + b"x" * (1 << 18) + b'"]',
]


@pytest.mark.parametrize("data", NONSENSE, ids=lambda data: repr(data[:30]) + str(len(data)))
def test_whatever_a_broken_agent_sends_ends_its_own_connection_alone(
    served: tuple[KeyValueServer, int], data: bytes
) -> None:
    server, port = served
    agent, peer = connect(port), Peer(port)
    with contextlib.suppress(ConnectionError):
        peer.send(data)
    assert ended(peer.connection)
    agent.add("1/words", "x")
    assert server.values == {"1/words": ["x"]}
    assert wait_for("the loss", server.lost, 5)[0] == 2
    agent.close()


def test_a_line_that_somebody_in_between_changes_repeats_or_makes_up_is_not_parsed(
    served: tuple[KeyValueServer, int],
) -> None:
    server, port = served
    for number in range(3):
        peer = Peer(port)
        line = peer.seal.close(b'["add", "1/words", "x"]')
        peer.connection.sendall([line.replace(b'"x"', b'"y"'), line + line, line[64:]][number])
        assert ended(peer.connection)
        assert server.get("1/words") == [["x"] if number else None], number


def test_no_agent_can_use_up_the_memory_of_node_0(served: tuple[KeyValueServer, int]) -> None:
    server, port = served
    peer = Peer(port)
    with contextlib.suppress(ConnectionError):
        for number in range(1000):
            peer.send(json.dumps(["add", f"{number}/words", *(f"{number:099}{word}" for word in range(9))]).encode())
    assert ended(peer.connection)
    assert len(json.dumps(server.values)) < kv_store.MESSAGE_BYTES
    server.set("plan", {})
    newcomer = connect(port)
    assert newcomer.get("plan") == [{}]
    newcomer.close()


def test_a_peer_that_does_not_read_keeps_nobody_waiting(served: tuple[KeyValueServer, int]) -> None:
    port = served[1]
    agent, peer = connect(port), Peer(port)
    agent.add("1/words", *(f"{number:099}" for number in range(900)))
    end = time.monotonic() + 20
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < end:  # each answer is 90 KB
            peer.send(b'["add", "1/words"]')
            began = time.monotonic()
            agent.add("2/words")
            assert time.monotonic() - began < 5
    assert time.monotonic() < end, "it was not dropped"
    agent.close()


def test_a_stranger_that_says_nothing_does_not_stay(
    served: tuple[KeyValueServer, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_server, "PROOF_S", 0.2)
    with socket.create_connection(("127.0.0.1", served[1]), 5) as stranger:
        stranger.sendall(b"mu")
        assert stranger.recv(1) == b""


def test_when_no_file_can_be_opened_strangers_make_room(served: tuple[KeyValueServer, int]) -> None:
    port = served[1]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(socket.socket()) for _ in range(30)]
        highest = max(file.fileno() for file in files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for file in files[:28]:
            file.connect(("127.0.0.1", port))
        began = time.process_time()
        time.sleep(1)
        assert time.process_time() - began < 0.5, "it spins"
        for file in files:
            file.close()
    agent = connect(port)
    agent.close()


@pytest.mark.parametrize("other", [Membership("digits-1/1", JOB.secret), Membership("digits-1/0", b"f" * 64)])
def test_another_job_and_another_secret_are_refused(served: tuple[KeyValueServer, int], other: Membership) -> None:
    with pytest.raises(NotProvenError, match="does not know this run's secret"):
        connect(served[1], membership=other)
    assert not served[0].clients


def test_an_agent_tells_a_listener_nothing_by_which_it_could_pass_for_anybody(
    served: tuple[KeyValueServer, int],
) -> None:
    """It asks node 0 for the proof that it lacks, and hands it on: the port is another, so it is of no use."""
    with bind("127.0.0.1", 0) as listener, contextlib.ExitStack() as stack:
        heard: list[bytes] = []

        def relay() -> None:
            victim = stack.enter_context(listener.accept()[0])
            line = victim.recv(1000)
            node0 = stack.enter_context(socket.create_connection(("127.0.0.1", served[1]), 5))
            node0.sendall(line)
            victim.sendall(node0.recv(1000))
            heard.extend([line, victim.recv(1000)])

        thread = threading.Thread(target=relay)
        thread.start()
        with pytest.raises(NotProvenError):
            connect(listener.getsockname()[1])
        thread.join(5)
    assert parse_hello(heard[0].strip(), 3)[0] == 1 and heard[1] == b""
    assert not served[0].clients
