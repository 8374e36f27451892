"""The memory that outlives a killed rank: what is whole is read, and nothing else."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.checkpoint.memory import NOTE, NOTE_HEAD, STATE, Memory
from trainer.data import rng

CPU = torch.device("cpu")


def hand_over(memory: Memory, key: tuple[int, int], data: bytes) -> bool:
    """As a survivor does it; false when another has handed over as new a state."""
    with memory.newer(key) as file:
        if file is None:
            return False
        file.seek(STATE.size)
        file.write(data)
        memory.seal(file, key, len(data), hashlib.sha256(data).digest())
        return True


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
    with memory.newer((1, 16)) as file:
        assert file is not None
        file.seek(STATE.size)
        file.write(b"torn")
    assert memory.read_state() is None and memory.step == -1


def test_a_changed_byte_is_noticed(memory: Memory) -> None:
    hand_over(memory, (1, 14), b"whole")
    os.pwrite(int(memory.paths[1]), b"x", STATE.size)
    assert memory.read_state() is None


def test_notes_are_of_one_rank_and_whole(memory: Memory) -> None:
    for moment in (8, 10, 12):
        offset = memory.note_offset(1, moment)
        memory.notes[offset + NOTE_HEAD : offset + NOTE_HEAD + 2] = moment.to_bytes(2, "little")
        NOTE.pack_into(memory.notes, offset, 3, moment, 2)
    NOTE.pack_into(memory.notes, memory.note_offset(1, 10), 0, -1, 0)  # being written when the rank was killed
    assert memory.read_notes(1) == {(3, 8): b"\x08\x00", (3, 12): b"\x0c\x00"}
    assert memory.read_notes(0) == {}


@pytest.mark.parametrize("use", [
    lambda: random.random(),
    lambda: random.gauss(0, 1),
    lambda: random.seed(7),
    lambda: [random.getrandbits(32) for _ in range(624)],  # the index is where it was
    lambda: np.random.rand(),
    lambda: np.random.seed(7),
    lambda: np.random.randint(0, 2**32, 624, dtype=np.uint32),
], ids=["random", "gauss", "seed", "round", "numpy", "numpy seed", "numpy round"])  # fmt: skip
def test_every_use_of_a_global_generator_is_seen(use: Callable[[], object]) -> None:
    random.seed(1)
    np.random.seed(1)
    watch, before = rng.Watch(), rng.get_state([CPU])
    assert not watch.moved()
    assert torch.equal(before, rng.get_state([CPU])), "looking changed it"
    use()
    assert watch.moved()


@pytest.mark.parametrize("use", [
    lambda: torch.rand(1),
    lambda: torch.randperm(3),
    lambda: torch.randn(1),
    lambda: torch.randn(1, dtype=torch.float64),
    lambda: torch.nn.functional.dropout(torch.ones(4)),
    lambda: torch.randint(0, 2**31, (624,)),  # the next word is where it was
    lambda: torch.manual_seed(7),
], ids=["uniform", "permutation", "normal", "double", "dropout", "round", "seed"])  # fmt: skip
def test_every_use_of_torchs_generator_is_seen(use: Callable[[], object]) -> None:
    """By its memory, which this version of torch must still lay out as we know it."""
    torch.manual_seed(1)
    watch = rng.Watch()
    assert watch.torch is not None and watch.torch_moved(), "the first look"
    for _ in range(3):
        assert not watch.torch_moved()
        before = torch.get_rng_state()
        assert not watch.torch_moved(), "looking changed it"
        use()
        assert watch.torch_moved() != torch.equal(before, torch.get_rng_state())


def test_a_number_that_torch_has_already_drawn_counts() -> None:
    watch = rng.Watch()
    for _ in range(4):  # every second one moves no word
        watch.torch_moved()
        torch.randn(1, dtype=torch.float64)
        assert watch.torch_moved()


def test_a_generator_that_is_kept_elsewhere_counts_as_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "torch", SimpleNamespace(default_generator=SimpleNamespace(get_state=torch.get_rng_state)))
    watch = rng.Watch()
    assert watch.torch is None and watch.torch_moved() and watch.torch_moved()


@pytest.mark.parametrize("draw", [lambda: random.gauss(0, 1), lambda: np.random.standard_normal()])
def test_a_number_that_is_already_drawn_counts(draw: Callable[[], float]) -> None:
    """Normal numbers come in pairs: the second moves nothing that can be watched."""
    draw()
    assert rng.Watch().moved()
    random.seed(1)
    np.random.seed(1)
