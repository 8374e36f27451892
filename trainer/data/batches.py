"""Samples to batches: every random number of a sample or a batch is seeded by what it is, not by who reads it when."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from trainer.data.rng import COLLATING, derive_seed, seed_generators
from trainer.data.sampler import Indices
from trainer.task import Task

Keys = tuple[int, Indices]
"""(epoch, indices) of one batch."""


class BatchDataset(Dataset[Any]):
    """A map-style dataset whose index is (epoch, indices), so that a worker reads a whole batch.

    A sample depends on (seed, epoch, index) alone. It is read in the cheapest exact way: see `Task.train_dataset`.
    """

    def __init__(self, dataset: Any, task: Task, seed: int) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, task.collate
        self.own_collate = type(task).collate is not Task.collate
        self.draws = hasattr(dataset, "sample")
        self.plain = type(dataset) is TensorDataset or getattr(dataset, "deterministic", False)
        self.at_once = type(dataset) is TensorDataset and not self.own_collate
        self.rng = np.random.Generator(np.random.Philox(key=0))
        self.start: Any = self.rng.bit_generator.state

    def __getitem__(self, keys: Keys) -> Any:
        """Read, seed and collate. Tensors in memory are indexed at once, which gives what collating items gives."""
        epoch, indices = keys
        if self.at_once:
            chosen = torch.from_numpy(indices)
            return [
                tensor.index_select(0, chosen) for tensor in self.dataset.tensors
            ]  # half the time of tensor[chosen]
        samples = [self.sample(epoch, index) for index in indices.tolist()]
        if self.own_collate:  # which may mix samples at random
            seed_generators(derive_seed(self.seed, epoch, int(indices[0]), COLLATING))
        return self.collate(samples)

    def sample(self, epoch: int, index: int) -> Any:
        """One sample, with generators seeded before; whatever draws after the loading is seeded itself."""
        if self.draws:
            # One generator starts anew: making one for each took a tenth of the time of small composed images.
            self.start["state"]["key"][0] = derive_seed(self.seed, epoch, index)
            self.rng.bit_generator.state = self.start
            return self.dataset.sample(index, self.rng)
        if not self.plain:
            seed_generators(derive_seed(self.seed, epoch, index))
        return self.dataset[index]
