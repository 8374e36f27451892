"""Samples to batches: every random number of a sample or a batch is seeded by what it is, not by who reads it when."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from trainer.data.rng import COLLATING, derive_seed, seed_generators
from trainer.data.sampler import Indices
from trainer.task import Task

Keys = tuple[int, Indices]
"""(epoch, indices) of one batch."""


class SeededDataset:
    """A dataset whose randomness depends on (seed, epoch, index) alone."""

    def __init__(self, dataset: Any, seed: int) -> None:
        """Choose the cheapest exact way to read `dataset`: see `Task.train_dataset`."""
        self.dataset, self.seed = dataset, seed
        self.draws = hasattr(dataset, "sample")
        self.plain = isinstance(dataset, TensorDataset) or getattr(dataset, "deterministic", False)
        self.rng = np.random.Generator(np.random.Philox(key=0))
        self.start: Any = self.rng.bit_generator.state

    def read(self, epoch: int, indices: Iterable[int]) -> list[Any]:
        """The samples of a batch."""
        if self.draws:
            return [self._sample(epoch, index) for index in indices]
        if self.plain:
            return [self.dataset[index] for index in indices]
        return [self._global(epoch, index) for index in indices]

    def _sample(self, epoch: int, index: int) -> Any:
        """Start one generator anew: making one for each sample cost a tenth of the time of small composed images."""
        self.start["state"]["key"][0] = derive_seed(self.seed, epoch, index)
        self.rng.bit_generator.state = self.start
        return self.dataset.sample(index, self.rng)

    def _global(self, epoch: int, index: int) -> Any:
        """Seed the global generators before the call; whatever draws after the loading is seeded itself."""
        seed_generators(derive_seed(self.seed, epoch, index))
        return self.dataset[index]


class BatchDataset(Dataset[Any]):
    """Read one batch, as a map-style dataset whose index is (epoch, indices): a worker reads a whole batch."""

    def __init__(self, dataset: Dataset[Any], task: Task, seed: int) -> None:
        """Tensors that lie in memory are indexed at once, which gives what collating their items gives."""
        self.samples, self.seed, self.collate = SeededDataset(dataset, seed), seed, task.collate
        self.own_collate = type(task).collate is not Task.collate
        plain = type(dataset) is TensorDataset and not self.own_collate
        self.tensors: tuple[Tensor, ...] | None = dataset.tensors if plain else None  # type: ignore[attr-defined]

    def __getitem__(self, keys: Keys) -> Any:
        """Read, seed and collate."""
        epoch, indices = keys
        if self.tensors is not None:
            chosen = torch.from_numpy(indices)
            return [tensor.index_select(0, chosen) for tensor in self.tensors]  # half the time of tensor[chosen]
        samples = self.samples.read(epoch, indices.tolist())
        if self.own_collate:  # which may mix samples at random
            seed_generators(derive_seed(self.seed, epoch, int(indices[0]), COLLATING))
        return self.collate(samples)
