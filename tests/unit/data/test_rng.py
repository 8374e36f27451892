"""Random generators: packed and restored exactly, and seeded per sample without leaving a trace."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data import rng
from trainer.data.loader import Seeded

CPU = torch.device("cpu")


def draw() -> tuple[Any, ...]:
    """Numbers of every generator; an odd count of normals leaves one of a pair over."""
    python, numpy = (random.random(), random.gauss(0, 1)), (float(np.random.normal()), np.random.randint(1000))
    return *python, *numpy, float(torch.randn(()))


@pytest.mark.parametrize("drawn", range(4))
def test_states_survive_a_checkpoint(drawn: int) -> None:
    rng.seed_all(5, 1, 2)
    for _ in range(drawn):
        draw()
    file = io.BytesIO()
    torch.save(torch.stack([rng.get_state([CPU]), rng.get_state([CPU])]), file)
    expected = [draw() for _ in range(3)]
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for state in states:  # the second one is a view at an odd address
        rng.seed_all(9, 9, 9)
        rng.set_state(state, [CPU])
        assert [draw() for _ in range(3)] == expected


def test_streams_differ() -> None:
    found = set()
    for seed in (0, 1, 2**32 - 1):
        for stream in (0, 1):
            for rank in (0, 1):
                rng.seed_all(seed, stream, rank)
                found.add(draw())
    assert len(found) == 12


class Noise:
    """Draws from every global generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return index, *draw()


def test_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    data = Seeded(Noise(), 7)
    first = [data.read(epoch, range(10)) for epoch in range(3)]
    draw()
    assert [[data.read(epoch, [index])[0] for index in range(10)] for epoch in range(3)] == first
    assert len({values[1:] for batch in first for values in batch}) == 30
    assert Seeded(Noise(), 8).read(0, [0]) != first[0][:1]


def test_reading_a_sample_leaves_the_generators_alone() -> None:
    rng.seed_all(1, 1, 1)
    expected = draw()
    rng.seed_all(1, 1, 1)
    Seeded(Noise(), 7).read(0, [0])
    assert draw() == expected


def test_a_dataset_that_fails_leaves_the_generators_alone() -> None:
    class Broken(Noise):
        def __getitem__(self, index: int) -> tuple[Any, ...]:
            draw()
            raise OSError("unreadable")

    rng.seed_all(1, 1, 1)
    expected = draw()
    rng.seed_all(1, 1, 1)
    with pytest.raises(OSError, match="unreadable"):
        Seeded(Broken(), 7).read(0, [0])
    assert draw() == expected
