"""Saving beside the training: what is written is the state as it was, one at a time, and a failure is never silent."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainer.checkpoint.background_writer import Writer


class Disk:
    """Takes what is committed, once it is told to."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.states: list[Any] = []

    def commit(self, state: Any) -> None:
        assert self.ready.wait(10)
        self.states.append(state)


def nothing() -> None:
    """No sign of life."""


@pytest.fixture
def disk() -> Disk:
    return Disk()


def test_what_is_written_is_the_state_at_its_step(disk: Disk) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "list": [1, (torch.ones(2), "x")]}
    expected = torch.save(state, buffer := io.BytesIO()) or buffer.getvalue()
    writer = Writer(asynchronous=True)
    writer.submit(state, disk.commit, nothing)
    for parameter in model.parameters():
        parameter.data.add_(1)
    optimizer.step()
    disk.ready.set()
    writer.wait(nothing)
    torch.save(disk.states[0], buffer := io.BytesIO())
    assert buffer.getvalue() == expected


def test_training_goes_on_meanwhile_and_the_next_save_waits(disk: Disk) -> None:
    writer = Writer(asynchronous=True)
    writer.submit({"step": 1}, disk.commit, nothing)
    assert disk.states == []
    beats: list[float] = []

    def beat() -> None:
        beats.append(time.monotonic())
        disk.ready.set()

    writer.submit({"step": 2}, disk.commit, beat)
    assert disk.states[0] == {"step": 1}
    assert beats
    writer.wait(nothing)
    assert [state["step"] for state in disk.states] == [1, 2]


@pytest.mark.parametrize("then", ["submit", "wait"])
def test_a_failure_is_raised_at_the_next_occasion_and_once(disk: Disk, then: str) -> None:
    def fail(state: Any) -> None:
        raise OSError("No space left on device")

    writer = Writer(asynchronous=True)
    writer.submit({}, fail, nothing)
    disk.ready.set()
    occasion: Callable[[], None] = {
        "submit": lambda: writer.submit({}, disk.commit, nothing), "wait": lambda: writer.wait(nothing)
    }[then]  # fmt: skip
    with pytest.raises(OSError, match="No space left"):
        occasion()
    occasion()
    writer.wait(nothing)


def test_without_a_thread_it_is_committed_and_fails_at_once(disk: Disk) -> None:
    disk.ready.set()
    state = {"weight": torch.ones(2)}
    Writer(asynchronous=False).submit(state, disk.commit, nothing)
    assert disk.states[0]["weight"].data_ptr() == state["weight"].data_ptr(), "no memory for a copy"


def test_memory_is_used_again_and_tied_weights_are_copied_once(disk: Disk) -> None:
    disk.ready.set()
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    writer = Writer(asynchronous=True)
    for _ in range(2):
        writer.submit(model.state_dict(), disk.commit, nothing)
    writer.wait(nothing)
    first, second = disk.states
    assert first["0.weight"].data_ptr() == first["1.weight"].data_ptr() == second["0.weight"].data_ptr()
    assert len(writer.copies) == 1


def test_a_shape_that_changes_gets_memory_of_its_own(disk: Disk) -> None:
    disk.ready.set()
    writer = Writer(asynchronous=True)
    for size in (2, 3):
        writer.submit({"memory": torch.full((size,), float(size))}, disk.commit, nothing)
        writer.wait(nothing)
    assert torch.equal(disk.states[1]["memory"], torch.full((3,), 3.0))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_sparse_tensors_are_written(disk: Disk, asynchronous: bool) -> None:
    disk.ready.set()
    state = {"grid": torch.eye(3).to_sparse(), "rows": torch.eye(3).to_sparse_csr()}
    writer = Writer(asynchronous=asynchronous)
    for _ in range(2):
        writer.submit(state, disk.commit, nothing)
        writer.wait(nothing)
    assert torch.equal(disk.states[1]["grid"].to_dense(), torch.eye(3))
    assert torch.equal(disk.states[1]["rows"].to_dense(), torch.eye(3))
