"""The memory that outlives a killed rank: what is whole is found, and nothing else; a lock has one owner that lives."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import replace

import pytest

from trainer.checkpoint.memory import Memory, Seal


@pytest.fixture
def memory() -> Memory:
    return Memory.make()


def fill(memory: Memory, index: int, moment: int, head: bytes = b"the head", run: int = 5) -> Seal:
    """As a rank does it, behind 100 bytes of tensors."""
    handle = memory.lock(index)
    assert handle is not None
    memory.unseal(index)
    os.pwrite(handle, bytes(100) + head, 0)
    seal = Seal(moment, 1, 100, len(head), run)
    memory.seal(index, seal, head)
    os.close(handle)
    return seal


def test_a_rank_finds_the_memory_of_its_agent(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in memory.environment().items():
        monkeypatch.setenv(name, value)
    memory.attempt = 7
    found = Memory.find()
    assert found is not None and found.sealed() == {} and found.step == -1 and found.attempt == 7
    seals = {0: fill(memory, 0, 28), 1: fill(memory, 1, 34)}
    assert found.sealed() == seals and found.step == 8
    assert found.sealed(5) == seals and found.sealed(6) == {}
    found.unseal(1)
    assert memory.sealed() == {0: seals[0]} and memory.step == 7
    monkeypatch.setenv("MUSTER_MEMORY", "/proc/1/fd/nothing /proc/1/fd/nothing")
    assert Memory.find() is None
    monkeypatch.delenv("MUSTER_MEMORY")
    assert Memory.find() is None


def test_a_torn_seal_and_a_changed_head_are_none(memory: Memory) -> None:
    seal = fill(memory, 0, 28)
    memory.seal(0, replace(seal, moment=32), b"another head")
    assert memory.sealed() == {}
    fill(memory, 0, 28)
    whole = bytes(memory.page)
    memory.page[64:72] = bytes(8)
    assert memory.sealed() == {}
    memory.page[:] = whole
    assert memory.sealed() == {0: seal}
    with open(memory.buffers[0], "r+b") as file:
        file.seek(103)
        file.write(b"X")
    assert memory.sealed() == {}


def test_a_lock_goes_with_its_owner_and_can_be_handed_on(memory: Memory) -> None:
    first = memory.lock(0)
    assert first is not None and memory.lock(0) is None and memory.lock(1) is not None
    handed_on = os.dup(first)
    os.close(first)
    assert memory.lock(0) is None
    os.close(handed_on)
    assert memory.lock(0) is not None


def test_a_sandbox_without_locks_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then checkpoints are written by the rank itself."""
    memory = Memory.make()
    monkeypatch.setenv("MUSTER_MEMORY", " ".join(memory.paths))
    assert memory.has_locks() and Memory.find() is not None

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not memory.has_locks() and Memory.find() is None
