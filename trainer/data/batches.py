"""Samples to batches: every random number of a sample or a batch is seeded by what it is, not by who reads it when."""

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from trainer.data.datasets import find_sample
from trainer.data.generators import find_generators, seed_own
from trainer.data.rng import COLLATING, derive_seed, seed_generators
from trainer.data.sampler import Indices
from trainer.errors import JobError
from trainer.task import Task

Keys = tuple[int, Indices]
"""(epoch, indices) of one batch."""


class Collating(Protocol):
    """What makes batches of samples: a task, or whoever answers like one."""

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch."""


class PlainCollate:
    """Torch's own way."""

    collate = Task.collate


class OwnCollate:
    """A function's way."""

    def __init__(self, function: Callable[[list[Any]], Any]) -> None:
        self.function = function

    def collate(self, samples: list[Any]) -> Any:
        """Call the function."""
        return self.function(samples)


def collating(function: Callable[[list[Any]], Any] | None) -> Collating:
    """What makes batches by a function; None: torch's own way."""
    return PlainCollate() if function is None else OwnCollate(function)


class BatchDataset(Dataset[Any]):
    """A map-style dataset whose index is (epoch, indices), so that a worker reads a whole batch.

    A sample depends on (seed, epoch, index) alone. It is read in the cheapest exact way: see `Task.train_dataset`.
    """

    def __init__(self, dataset: Any, task: Collating, seed: int, key: str = "dataset") -> None:
        """`key`: how an error calls the dataset."""
        self.dataset, self.task, self.seed, self.key = dataset, task, seed, key
        self.own_collate = type(task).collate is not Task.collate
        self.draw = find_sample(dataset)
        self.plain = type(dataset) is TensorDataset or getattr(dataset, "deterministic", False) is True
        self.at_once = type(dataset) is TensorDataset and not self.own_collate
        self.rng = np.random.Generator(np.random.Philox(key=0))
        self.start: Any = self.rng.bit_generator.state
        self.of_dataset = {} if self.plain or self.draw else find_generators(dataset, "dataset")
        self.of_task = find_generators(task, "task") if self.own_collate else {}
        self.process = -1
        """Which looked for generators again: one that is made when it is first used is another in each worker."""

    def __getitem__(self, keys: Keys) -> Any:
        """A batch; or a JobError, which a worker's exception could not be when it arrives."""
        try:
            return self.read(*keys)
        except JobError as error:
            return error

    def read(self, epoch: int, indices: Indices) -> Any:
        """Read, seed and collate. Tensors in memory are indexed at once, which gives what collating items gives."""
        if self.at_once:
            chosen = torch.from_numpy(indices)
            return [
                tensor.index_select(0, chosen) for tensor in self.dataset.tensors
            ]  # half the time of tensor[chosen]
        if self.process != os.getpid():
            self._look_again(epoch, int(indices[0]))
        samples = [self.sample(epoch, index) for index in indices.tolist()]
        for index, sample in zip(indices.tolist(), samples, strict=True):
            if sample is None:
                problem = f"sample {index} is None, so the batch would be smaller than expected"
                remedy = "Leave unreadable samples out of the dataset, or return something with a (sum, count) of zero"
                raise JobError(self.key, None, problem, remedy)
        if self.own_collate:  # which may mix samples at random
            value = derive_seed(self.seed, epoch, int(indices[0]), COLLATING)
            seed_generators(value)
            seed_own(self.of_task, value)
            return self.task.collate(samples)
        try:
            return self.task.collate(samples)
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
            problem = (
                f"samples {indices.tolist()[:8]} cannot be combined into a batch: {' '.join(str(error).split())[:300]}"
            )
            remedy = "Give the task a method collate(samples), or return samples of equal shapes, keys and types"
            raise JobError("task.collate", "default", problem, remedy) from error

    def _look_again(self, epoch: int, index: int) -> None:
        """Find the generators that a dataset makes when its first sample is read."""
        self.process = os.getpid()
        if not (self.plain or self.draw):
            self.sample(epoch, index)
            self.of_dataset = find_generators(self.dataset, "dataset")

    def sample(self, epoch: int, index: int) -> Any:
        """One sample, with generators seeded before; whatever draws after the loading is seeded itself."""
        if self.draw is not None:
            # One generator starts anew: making one for each took a tenth of the time of small composed images.
            self.start["state"]["key"][0] = derive_seed(self.seed, epoch, index)
            self.rng.bit_generator.state = self.start
            return self.draw(index, self.rng)
        if not self.plain:
            value = derive_seed(self.seed, epoch, index)
            seed_generators(value)
            seed_own(self.of_dataset, value)
        return self.dataset[index]
