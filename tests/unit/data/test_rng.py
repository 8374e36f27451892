"""Random numbers: a function of the job's seed and of what is computed, whatever was drawn before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from trainer.data.batches import BatchDataset
from trainer.data.rng import COLLATING, EVALUATION, SAMPLES, STEPS, derive_seed, derive_step_seed, seed_generators
from trainer.tasks.digits import Digits


def draw() -> tuple[Any, ...]:
    """Numbers of every generator; an odd count of normals leaves one of a pair over."""
    python, numpy = (random.random(), random.gauss(0, 1)), (float(np.random.normal()), np.random.randint(1000))
    return *python, *numpy, float(torch.randn(())), float(torch.randn((), dtype=torch.float64))


def test_what_was_drawn_before_changes_nothing() -> None:
    found = set()
    for drawn in range(4):
        for _ in range(drawn):
            draw()
        seed_generators(derive_seed(5, 1, 2))
        found.add((draw(), draw()))
    assert len(found) == 1


def test_streams_differ() -> None:
    found = set()
    for stream in (SAMPLES, COLLATING, STEPS, EVALUATION):
        for seed in (0, 1, 2**32 - 1):
            for step in (0, 1):
                for rank in (0, 1):
                    seed_generators(derive_seed(seed, step, rank, stream))
                    found.update(draw())
    assert len(found) > 48 * 5


def test_seeds_never_change() -> None:
    """A run that began under another version of this package must resume exactly."""
    assert [derive_seed(0, 0, 0), derive_seed(1, 2, 3)] == [2891389769238885931, 13041116711478803063]
    assert derive_seed(1, 2, 3, STEPS) == 3512366156060974893
    assert derive_seed(1, 2, 3, EVALUATION) == 6790812417750518539


def test_seeds_of_steps_are_the_same_however_they_are_derived() -> None:
    for step in (0, 63, 64, 65, 10**12):
        assert derive_step_seed(3, step, 1) == derive_seed(3, step, 1, STEPS)


class Noise(Dataset[Any]):
    """Draws from every global generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return index, *draw()


def test_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    data = BatchDataset(Noise(), Digits(), 7)
    first = [[data.sample(epoch, index) for index in range(10)] for epoch in range(3)]
    draw()
    assert [[data.sample(epoch, index) for index in reversed(range(10))][::-1] for epoch in range(3)] == first
    assert len({values[1:] for batch in first for values in batch}) == 30
    assert BatchDataset(Noise(), Digits(), 8).sample(0, 0) != first[0][0]


class Mixing(Digits):
    """Collates at random, as CutMix does."""

    def collate(self, samples: list[Any]) -> Any:
        """Only the random numbers."""
        return draw()


def test_a_collate_function_may_draw_too() -> None:
    task = Mixing()
    batches = BatchDataset(task.train_dataset(), task, 7)
    first = [batches[epoch, np.array([index, 0])] for epoch in range(3) for index in range(3)]
    draw()
    assert [batches[epoch, np.array([index, 0])] for epoch in range(3) for index in range(3)] == first
    assert len(set(first)) == 9


def test_a_subclass_of_tensor_dataset_that_draws_is_seeded() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            return self.tensors[0][index] + torch.randn(1)

    data = BatchDataset(Noisy(torch.zeros(4, 1)), Digits(), 7)
    first = data.sample(0, 2)
    torch.randn(5)
    assert torch.equal(data.sample(0, 2), first)
