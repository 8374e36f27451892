"""What becomes of an order for a checkpoint: whoever asks hears what went wrong, in the same words at any moment."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.checkpoint import files
from trainer.checkpoint.memory import Memory, Seal
from trainer.checkpoint.orders import Orders
from trainer.checkpoint.writer import Order, describe
from trainer.checkpoint.writer import send as answer
from trainer.run import attempts
from trainer.run.attempts import StaleAttempt
from trainer.run.folder import RunFolder

GONE = "the process that writes checkpoints was killed"
SEAL = Seal(moment=4, attempt=1, offset=0, size=0, run=1)


@pytest.fixture
def ordered(tmp_path: Path) -> tuple[Orders, socket.socket]:
    """Orders, one of them sent to a process, and that process's end of the connection."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "writer"))
    server.listen()
    orders = Orders(Memory.make(), tmp_path / "writer")
    send(orders)
    return orders, server.accept()[0]


def send(orders: Orders) -> None:
    handle = orders.memory.lock(0)
    assert handle is not None
    orders.send(Order("run", 1, 0, {}, 1, None), SEAL, handle)


def test_a_writer_that_dies_before_the_next_order(ordered: tuple[Orders, socket.socket]) -> None:
    orders, writer = ordered
    writer.close()
    with pytest.raises(RuntimeError, match=GONE):
        send(orders)
    assert orders.connection is None and not orders.count
    handle = orders.memory.lock(0)  # the order that could not be sent holds nothing
    assert handle is not None
    os.close(handle)


def test_a_writer_that_dies_while_somebody_waits_for_it(ordered: tuple[Orders, socket.socket]) -> None:
    orders, writer = ordered
    writer.close()
    with pytest.raises(RuntimeError, match=GONE):
        orders.wait(lambda: None)


def test_a_server_that_says_it_timed_out_has_answered(ordered: tuple[Orders, socket.socket]) -> None:
    """So the thread that writes is waited for, as after any other error; only one that says nothing hangs."""
    orders, writer = ordered

    def write() -> None:
        answer(writer, describe(OSError(errno.ETIMEDOUT, "Connection timed out", "/nfs")))
        while writer.recv(4096):
            pass
        time.sleep(0.2)  # the rest of what it has to do

    orders.thread = thread = threading.Thread(target=write)
    thread.start()
    with pytest.raises(TimeoutError, match="/nfs"):
        orders.close(lambda: None)
    assert not thread.is_alive()


def test_an_attempt_that_the_own_agent_begins_meanwhile_is_no_other_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when that happens between the two looks, at the folder and into the memory; another's is one."""
    run, memory = RunFolder(tmp_path), Memory.make()
    memory.attempt = 0
    attempts.claim(run, 0)

    def begin_and_look(run: RunFolder, look: Callable[[RunFolder], int] = attempts.newest) -> int:
        if look(run) == 0:
            memory.attempt = 1
            (run.attempts / "000001").touch()
        return look(run)

    monkeypatch.setattr(attempts, "newest", begin_and_look)
    assert files.commit(run.checkpoints, 3, {}, {}, 0, lambda: memory.attempt).is_dir()
    (run.attempts / "000002").touch()
    with pytest.raises(StaleAttempt, match="replaced by attempt 2"):
        files.commit(run.checkpoints, 4, {}, {}, 0, lambda: memory.attempt)
