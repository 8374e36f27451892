"""Batches of a stream: the same samples at any number of ranks, and from any place on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trainer.data.device_mover import DeviceMover
from trainer.data.sampler import Position
from trainer.data.stream import MARK, Stream

COUNT, BATCH = 103, 4


class Plain:
    """Numbers one after the other."""

    read = 0

    def __iter__(self) -> Iterator[int]:
        for number in range(COUNT):
            self.read += 1
            yield number


class Stateful(Plain):
    """It can be asked where it is."""

    at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < COUNT:
            self.at, self.read = self.at + 1, self.read + 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def stream(dataset: Any, rank: int = 0, ranks: int = 1, accumulate: int = 1) -> Stream:
    mover = DeviceMover(torch.device("cpu"), None, False, 2)
    return Stream(dataset, BATCH, accumulate, list, 0, rank, ranks, mover)


def used(source: Stream, position: Position, kept: dict[str, Any] | None = None) -> list[int]:
    """What counts of all micro-batches; each batch holds the samples that it says."""
    found = []
    for micro, batch in source.read(position, kept or {}):
        assert batch == micro.indices.tolist()
        found += batch[: micro.count]
    return found


@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (3, 1), (2, 2), (7, 1)])
def test_each_sample_counts_once(ranks: int, accumulate: int) -> None:
    shares = [used(stream(Plain(), rank, ranks, accumulate), Position()) for rank in range(ranks)]
    assert sorted(itertools.chain(*shares)) == list(range(COUNT))


def test_the_last_batch_is_known_before_it_is_used() -> None:
    source = stream(Plain())
    ends = [source.last for _ in source.read(Position(), {})]
    assert ends == [False] * (len(ends) - 1) + [True]


@pytest.mark.parametrize("kind", [Plain, Stateful])
@pytest.mark.parametrize("batches", [1, MARK - 1, MARK, MARK + 1, 2 * MARK + 3])
def test_it_goes_on_where_it_was(kind: type[Plain], batches: int) -> None:
    first = stream(kind())
    for _, _ in zip(range(batches), first.read(Position(), {}), strict=False):
        before = first.place()  # while a batch is in use, it is not done
    position = Position(0, 0, (batches - 1) * BATCH)
    second = stream(kind())
    note = second.explain_start(position, before)
    assert used(second, position, before) == list(range((batches - 1) * BATCH, COUNT))
    if kind is Stateful and batches > MARK:
        assert second.dataset.read <= COUNT - (batches - 1) // MARK * MARK * BATCH and "state_dict" in note
    else:
        assert second.dataset.read == COUNT and (batches == 1) == (not note)


class Shuffled(Plain):
    """Numbers through a buffer, which global generators shuffle."""

    def __iter__(self) -> Iterator[int]:
        waiting: list[int] = []
        for number in super().__iter__():
            waiting.append(number)
            if len(waiting) == 10:
                yield waiting.pop(random.randrange(10))
        random.shuffle(waiting)
        yield from waiting


def test_a_buffer_that_is_shuffled_is_shuffled_again() -> None:
    calm = []
    for micro, batch in stream(Shuffled()).read(Position(), {}):
        calm += batch
        random.seed(micro.step_count)  # each step, and each rank in it, has random numbers of its own
    assert sorted(calm) == list(range(COUNT)) and calm != list(range(COUNT))
    later = stream(Shuffled()).read(Position(0, 0, 9 * BATCH), {})
    assert [number for _, batch in later for number in batch] == calm[9 * BATCH :]
