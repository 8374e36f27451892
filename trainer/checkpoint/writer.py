"""Writing checkpoints beside the training: what whoever does that is told, by a socket, and does.

With an order comes the locked buffer that the state is in (`trainer.checkpoint.memory`), as a descriptor. It is on its
way, or here, until the checkpoint is committed; whether the rank that sent it still lives does not matter.
"""

import contextlib
import fcntl
import json
import math
import os
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.checkpoint import files
from trainer.checkpoint.memory import Memory, Seal
from trainer.checkpoint.snapshot import interpret, put_together, read_raw
from trainer.run.attempts import StaleAttempt
from trainer.run.folder import RunFolder

NICE = 5
"""Beside a training that uses all cores, writing gets a quarter of one. Linux gives nobody priority back."""
LOOK_S = 0.5
"""Between two signs of life."""
LENGTH = struct.Struct("<q")


@dataclass(frozen=True)
class Order:
    """A checkpoint to commit."""

    run: str
    step: int
    attempt: int
    facts: dict[str, Any]
    """What the manifest says of the run."""
    keep_last: int
    best: str | None
    """The name of the checkpoint that is kept in any case."""
    urgent: bool = False
    """Whether nothing trains until it is committed."""
    shard: tuple[int, int] | None = None
    """Which of how many shards the contents are; None: they are all."""
    number: int = 0
    """Tells the checkpoints of a sharded training apart; of two, the later one has the greater."""
    limit_s: float = math.inf
    """How long the first writer waits for others that write nothing."""


def commit(
    order: Order, contents: dict[str, Any], owner: Callable[[], int] | None = None,
    is_alone: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Commit a checkpoint, record it, and remove those that are not kept any more.

    `owner`: see `files.commit`; `is_alone`: see `Meeting.collect`. Of shards the first writer does it for all.
    """
    run = RunFolder(Path(order.run))
    if order.shard is None:
        payload = {"model.pt": contents.pop("model"), "state.pt": contents}
        folder = files.commit(run.checkpoints, order.step, payload, order.facts, order.attempt, owner)
    else:
        place = run.checkpoints, order.step, order.number, (order.shard[0], order.shard[1])
        part = files.commit_part(*place, contents, order.facts, order.attempt, owner, is_alone, order.limit_s)
        if part is None:
            return
        folder = part
    run.record("checkpoint", attempt=order.attempt, step=order.step, folder=str(folder.relative_to(run.path)))
    files.prune(run.checkpoints, order.keep_last, order.best)
    if order.shard is not None:  # what writers began when the first one had given up already
        files.remove_pending(run.checkpoints, order.number)


def serve(connection: socket.socket, memory: Memory) -> None:
    """Commit what one rank orders, one after the other, until it has gone and all is done."""
    swept = False
    while (received := receive(connection)) is not None:
        message, [handle] = received
        order, problem = Order(**message["order"]), None
        try:
            if not swept and (order.shard is None or not order.shard[0]):
                # Nobody else writes now, but to this checkpoint, or a later one; another may have been killed before.
                below = math.inf if order.shard is None else order.number
                files.sweep(RunFolder(Path(order.run)).checkpoints, below)
                swept = True
            state = put_together(*interpret(*read_raw(handle, Seal(**message["seal"]))))
            write = partial(commit, order, state, lambda: memory.attempt, lambda: has_gone(connection))
            write() if order.urgent else aside(write, NICE)
            del state, write
        except StaleAttempt as error:
            print(f"a checkpoint of step {order.step} is given up: {error}", file=sys.stderr, flush=True)
            problem = describe(error)
        except Exception as error:
            traceback.print_exc()
            problem = describe(error)
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)
        with contextlib.suppress(OSError):  # the rank was killed meanwhile
            send(connection, problem)
    connection.close()


def has_gone(connection: socket.socket) -> bool:
    """Whether the other side will send nothing more."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def aside(action: Callable[[], object], nice: int = 0, beat: Callable[[], None] = lambda: None) -> None:
    """Do something in a thread of its own, and wait for it with signs of life. Raises Exception: what went wrong."""
    problems: list[BaseException] = []

    def act() -> None:
        try:
            if nice:
                own = threading.get_native_id()  # on Linux a thread has a priority of its own
                os.setpriority(os.PRIO_PROCESS, own, max(nice, os.getpriority(os.PRIO_PROCESS, own)))
            action()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=act, name="checkpoint", daemon=True)  # a disk that hangs holds no process back
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_S)
        beat()
    if problems:
        raise problems[0]


def send(connection: socket.socket, message: Any, handles: Sequence[int] = ()) -> None:
    """Send what JSON can say, and descriptors."""
    data = json.dumps(message).encode()
    if handles:
        socket.send_fds(connection, [LENGTH.pack(len(data))], handles)
        connection.sendall(data)
    else:
        connection.sendall(LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> tuple[Any, list[int]] | None:
    """What the other side sent; None: it has gone."""
    data: bytes = b""
    handles: list[int] = []
    with contextlib.suppress(ConnectionResetError):
        data, handles, _, _ = socket.recv_fds(connection, LENGTH.size, 1, socket.MSG_CMSG_CLOEXEC)
        if len(data) == LENGTH.size:
            size = LENGTH.unpack(data)[0]
            data = connection.recv(size, socket.MSG_WAITALL)
            if len(data) == size:
                return json.loads(data), handles
    for handle in handles:  # of an order that was cut short
        os.close(handle)
    return None


def describe(error: Exception) -> dict[str, Any]:
    """An exception, as JSON can say it."""
    known = (error.errno, error.strerror, error.filename) if isinstance(error, OSError) else None
    return {"type": type(error).__name__, "message": str(error), "system": known}


def rebuild(problem: dict[str, Any]) -> Exception:
    """The exception that was described, as far as it matters."""
    if problem["system"]:
        return OSError(*problem["system"])
    if problem["type"] == StaleAttempt.__name__:
        return StaleAttempt(problem["message"])
    return RuntimeError(f"{problem['type']}: {problem['message']}")
