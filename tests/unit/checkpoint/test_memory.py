"""The memory that outlives a killed rank: what is whole is read, and nothing else."""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

import pytest
import torch
from torch import nn

from trainer.checkpoint.handover import BufferNotes
from trainer.checkpoint.memory import NOTE, STATE, Memory


def hand_over(memory: Memory, key: tuple[int, int], data: bytes) -> bool:
    """As a survivor does it; false when another has handed over as new a state."""
    written = []

    def write(file: BinaryIO) -> bytes:
        written.append(file.write(data))
        return hashlib.sha256(data).digest()

    memory.write_state(key, write)
    return bool(written)


@pytest.fixture
def memory() -> Memory:
    return Memory.make(2)


def test_a_rank_finds_the_memory_of_its_agent(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in memory.environment().items():
        monkeypatch.setenv(name, value)
    found = Memory.find()
    assert found is not None and found.read_state() is None and found.step == -1
    assert hand_over(memory, (1, 14), b"state")
    assert found.read_state() == ((1, 14), b"state") and found.step == 7
    found.clear_state()
    assert memory.read_state() is None and memory.step == -1
    monkeypatch.setenv("MUSTER_MEMORY", "/proc/1/fd/nothing /proc/1/fd/nothing")
    assert Memory.find() is None


def test_the_newest_state_of_a_node_stays(memory: Memory) -> None:
    assert hand_over(memory, (1, 14), b"a longer first one")
    assert not hand_over(memory, (1, 14), b"the same again") and not hand_over(memory, (1, 12), b"older")
    assert hand_over(memory, (1, 16), b"newer") and memory.read_state() == ((1, 16), b"newer")
    assert hand_over(memory, (2, 4), b"next") and memory.read_state() == ((2, 4), b"next")


def test_a_state_that_was_not_finished_is_none(memory: Memory) -> None:
    hand_over(memory, (1, 14), b"whole")

    def tear(file: BinaryIO) -> bytes:
        file.write(b"torn")
        raise InterruptedError

    with pytest.raises(InterruptedError):
        memory.write_state((1, 16), tear)
    assert memory.read_state() is None and memory.step == -1


def test_a_changed_byte_is_noticed(memory: Memory) -> None:
    hand_over(memory, (1, 14), b"whole")
    with memory.state.open("r+b") as file:
        os.pwrite(file.fileno(), b"x", STATE.size)
    assert memory.read_state() is None


def write_notes(memory: Memory, model: nn.Module, *steps: int) -> BufferNotes:
    """As rank 0 of attempt 3 does while it trains; the buffer holds the step."""
    notes = BufferNotes(model)
    notes.start(memory, 3, steps[0])
    for step in steps:
        next(model.buffers()).fill_(step)
        notes.write(step)
    return notes


def test_notes_of_the_last_steps_are_read(memory: Memory) -> None:
    notes = write_notes(memory, nn.BatchNorm1d(3), 7, 8, 9, 10)
    found = memory.read_notes()
    assert set(found) == {(3, 8), (3, 9), (3, 10)}
    contents = {"model": {"weight": 1, "running_mean": None}, "objects": {"average": {"state": {"model": {}}}}}
    notes.put(found[3, 9], contents)
    assert contents["model"]["weight"] == 1  # type: ignore[index]
    for weights in (contents["model"], contents["objects"]["average"]["state"]["model"]):  # type: ignore[index]
        assert torch.equal(weights["running_mean"], torch.full((3,), 9.0))  # type: ignore[index, call-overload]
        assert torch.equal(weights["num_batches_tracked"], torch.tensor(0))  # type: ignore[index, call-overload]


def test_a_note_that_was_not_finished_is_none(memory: Memory) -> None:
    write_notes(memory, nn.BatchNorm1d(3), 7, 8)
    NOTE.pack_into(memory.notes, memory.note_offset(8), 0, -1, 0)  # being written when the rank was killed
    assert set(memory.read_notes()) == {(3, 7)}


def test_a_model_without_buffers_takes_no_notes(memory: Memory) -> None:
    BufferNotes(nn.Linear(3, 3)).start(memory, 3, 7)
    assert memory.read_notes() == {}


def test_a_buffer_that_user_code_replaced_is_noticed(memory: Memory) -> None:
    model = nn.BatchNorm1d(3)
    notes = write_notes(memory, model, 7)
    assert notes.hold()
    model.running_mean = torch.ones(3)
    assert not notes.hold()
