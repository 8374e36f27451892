"""The agents' key-value store: what it keeps, whom it lets in, and whom it misses."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from muster_runs import wait_for

from trainer.agent import kv_store
from trainer.agent.kv_store import KeyValueClient, KeyValueServer, PeerLost, bind

JOB = "digits-1/0"


def free_port() -> int:
    with bind("127.0.0.1", 0) as probe:
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def served() -> Iterator[tuple[KeyValueServer, int]]:
    """A server for three nodes, and its port."""
    server = KeyValueServer(JOB, 3)
    yield server, server.listen("127.0.0.1", [free_port()])
    server.close(linger_s=0)


def connect(port: int, node: int = 1, identity: str = JOB) -> KeyValueClient:
    return KeyValueClient("127.0.0.1", port, identity, node)


GREETING = f"muster {JOB} 2\n".encode()


def test_all_sides_see_the_same_values(served: tuple[KeyValueServer, int]) -> None:
    server, port = served
    first, second = connect(port), connect(port, 2)
    first.set("plan", {"attempt": 3, "names": ["a", "b"]})
    assert second.get("plan", "nothing") == [{"attempt": 3, "names": ["a", "b"]}, None]
    assert [first.join("who", "1"), server.join("who", "0"), second.join("who", "2", "3")] == [1, 2, 4]
    assert first.join("who", "1", "0") == 4, "who is in it already counts once"
    assert server.get("who") == second.get("who") == [dict.fromkeys("1023", True)]
    for client in (first, second):
        client.close()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 5_000_000,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff\xff\xff\xff" + b"x" * 100_000,
        b"[" * 1000 + b"\n",
        b"muster another/0 2\n",
        f"muster {JOB} 3\n".encode(),
        f"muster {JOB} 0\n".encode(),
        f"muster {JOB} x\n".encode(),
        f"muster {JOB} ".encode() + b"1" * 5000 + b"\n",
        GREETING + b"[" * 50_000 + b"\n",
        GREETING + b"\xff\xfe\n",
        GREETING + b"7\n",
        GREETING + b"[]\n",
        GREETING + b'["set", [], 1]\n',
        GREETING + b'["join", "text", "a"]\n',
        GREETING + b'["join", "words", []]\n',
        GREETING + b'["set", "key"]\n',
        GREETING + b'["format", "disk"]\n',
        GREETING + b'["set", "key", "' + b"x" * (1 << 20) + b'"]\n',
        GREETING + json.dumps(["get", *["text"] * 2000]).encode() + b"\n",
    ],
    ids=lambda data: repr(data[:40]) + str(len(data)),
)
def test_whatever_a_stranger_or_a_broken_agent_sends_ends_its_own_connection_alone(
    served: tuple[KeyValueServer, int], data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "GREETING_S", 1.0)
    server, port = served
    agent = connect(port)
    agent.set("text", "x" * 1000)
    reset = contextlib.suppress(ConnectionError)  # it may be thrown out before it has sent everything
    with socket.create_connection(("127.0.0.1", port), 5) as stranger, reset:
        stranger.sendall(data)
        while stranger.recv(1 << 16):
            pass
    assert agent.get("text") == server.get("text") == ["x" * 1000]
    assert list(server.clients) == ([1, 2] if data.startswith(GREETING) else [1])
    agent.close()


def test_a_stranger_that_says_nothing_does_not_stay(
    served: tuple[KeyValueServer, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "GREETING_S", 0.2)
    with socket.create_connection(("127.0.0.1", served[1]), 5) as stranger:
        stranger.sendall(b"mu")
        assert stranger.recv(1) == b""


def test_another_job_is_refused(served: tuple[KeyValueServer, int]) -> None:
    with pytest.raises(OSError):
        connect(served[1], identity="digits-1/1")
    assert not served[0].clients


def test_an_agent_whose_connection_ends_is_missed_at_once_and_one_that_leaves_is_not(
    served: tuple[KeyValueServer, int],
) -> None:
    server, port = served
    leaving, dying = connect(port, 1), connect(port, 2)
    assert server.lost() is None
    leaving.close()
    dying.connection.shutdown(socket.SHUT_RDWR)
    lost = wait_for("the loss", server.lost, 5)
    assert lost == (2, "its agent is gone: the connection ended")
    successor = connect(port, 2)
    assert server.lost() is None
    successor.close()


def test_an_agent_that_falls_silent_is_missed_though_its_connection_stays(
    served: tuple[KeyValueServer, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "SILENT_S", 2.5)
    server, port = served
    beating = connect(port, 1)
    with socket.create_connection(("127.0.0.1", port), 5) as silent:
        silent.sendall(GREETING)
        began = time.monotonic()
        lost = wait_for("the loss", server.lost, 10)
        assert lost[0] == 2 and "no beat of its agent" in lost[1]
        assert time.monotonic() - began >= 2.4
        assert beating.lost() is None
    beating.close()


@pytest.mark.parametrize("drips", [False, True])
def test_a_server_that_does_not_answer_is_missed_within_the_bound(monkeypatch: pytest.MonkeyPatch, drips: bool) -> None:
    monkeypatch.setattr(kv_store, "ANSWER_S", 0.5)
    with bind("127.0.0.1", 0) as listener, contextlib.ExitStack() as stack:
        held = []

        def greet() -> None:
            held.append(stack.enter_context(listener.accept()[0]))
            held[0].sendall(f"muster {JOB} \n".encode())

        thread = threading.Thread(target=greet)
        thread.start()
        client = connect(listener.getsockname()[1])
        thread.join()
        if drips:
            held[0].sendall(b'["pl')
        began = time.monotonic()
        with pytest.raises(PeerLost, match="does not answer"):
            client.get("plan")
        assert time.monotonic() - began < 3
        assert client.lost() is not None
