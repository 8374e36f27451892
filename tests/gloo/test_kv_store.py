"""What the agents share: what is kept, whom node 0 lets in, and whom it misses."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
from agents_peer import JOB, Peer, connect
from muster_runs import wait_for

from trainer.agent import kv_client, kv_server
from trainer.agent.kv_server import KeyValueServer, bind
from trainer.agent.kv_store import PeerLost
from trainer.agent.proof import Seal, make_nonce, parse_hello, prove


def test_all_sides_see_the_same_values(served: tuple[KeyValueServer, int]) -> None:
    server, port = served
    first = connect(port)
    first.set("stop", True)
    server.set("plan", {"attempt": 3, "names": ["a", "b"]})
    second = connect(port, 2)
    assert second.get("plan", "stop", "nothing") == [{"attempt": 3, "names": ["a", "b"]}, True, None]
    first.add("1/who", "1")
    server.add("1/who", "0")
    second.add("1/who", "2", "1")
    for side in (server, first, second):
        wait_for("the words", lambda side=side: side.get("1/who") == [["1", "0", "2"]], 5)
    for client in (first, second):
        client.close()


def test_what_all_have_told_all_know_and_node_0_what_it_was(served: tuple[KeyValueServer, int]) -> None:
    server, port = served
    first, second = connect(port), connect(port, 2)
    for side, value in ((first, "a"), (server, None), (first, "b")):
        side.tell("1/report", value)
        assert server.get("1/report") == first.get("1/report") == [None]
    second.tell("1/report", {"c": 1})
    assert server.told["1/report"] == {0: None, 1: "b", 2: {"c": 1}}
    for side in (server, first, second):
        wait_for("the word of all", lambda side=side: side.get("1/report") == [True], 5)
    server.forget(2)
    assert not server.told and server.get("1/report") == [None]
    for client in (first, second):
        client.close()


def test_who_waits_is_woken(served: tuple[KeyValueServer, int]) -> None:
    server, port = served
    for waits, changes in ((connect(port), server), (server, connect(port, 2))):
        waits.clear()
        began = time.monotonic()
        threading.Timer(0.1, changes.add, ("1/words", str(id(waits)))).start()
        waits.wait(20)
        assert 0.05 < time.monotonic() - began < 10


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
    monkeypatch.setattr(kv_server, "SILENT_S", 2.5)
    server, port = served
    beating = connect(port, 1)
    silent = Peer(port)
    began = time.monotonic()
    lost = wait_for("the loss", server.lost, 10)
    assert lost[0] == 2 and "no beat of its agent" in lost[1]
    assert time.monotonic() - began >= 2.4
    assert beating.lost() is None
    silent.connection.close()
    beating.close()


@pytest.mark.parametrize("drips", [False, True])
def test_a_server_that_does_not_answer_is_missed_within_the_bound(monkeypatch: pytest.MonkeyPatch, drips: bool) -> None:
    monkeypatch.setattr(kv_client, "ANSWER_S", 0.5)
    with bind("127.0.0.1", 0) as listener, contextlib.ExitStack() as stack:
        held, port = [], listener.getsockname()[1]

        def prove_and_fall_silent() -> None:
            held.append(stack.enter_context(listener.accept()[0]))
            file = stack.enter_context(held[0].makefile("rb"))
            (node, nonce), own = parse_hello(file.readline().strip(), 3), make_nonce()
            key = JOB.key(node, port, nonce, own)
            held[0].sendall(own + b" " + prove(key, b"server") + b"\n")
            file.readline()
            held[0].sendall(Seal(key, b"server").close(b"[true, {}]"))

        thread = threading.Thread(target=prove_and_fall_silent)
        thread.start()
        client = connect(port)
        thread.join()
        if drips:
            held[0].sendall(b'["pl')
        began = time.monotonic()
        with pytest.raises(PeerLost, match="does not answer"):
            client.tell("plan")
        assert time.monotonic() - began < 3
        assert client.lost() is not None


def test_node_0_is_missed_by_an_agent_that_asks_for_nothing(
    served: tuple[KeyValueServer, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyValueServer, "_beat", lambda self, loop: None)
    monkeypatch.setattr(kv_client, "ANSWER_S", 0.5)
    monkeypatch.setattr(kv_client, "BEATS", 1)
    _, port = served
    client = connect(port)
    assert client.lost() is None
    lost = wait_for("the loss", client.lost, 10)
    assert lost == (0, "the agent of node 0 does not answer: nothing for 1 s")
