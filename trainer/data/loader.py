"""Loading: datasets to batches, seeded per sample, in the rank or in worker processes, ahead of a GPU.

Which samples, and in which order, is decided in `trainer.data.sampler`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainer.config.job import Data
from trainer.data.nested import map_tensors
from trainer.data.rng import COLLATING, derive_seed, seed_generators
from trainer.data.sampler import Indices
from trainer.task import Task
from trainer.wiring.variables import heartbeat_file

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

    def __len__(self) -> int:
        """Samples in the dataset."""
        return len(self.dataset)

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


class BatchDataset:
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


def _start_worker(_: int) -> None:
    """Signals reach the whole process group; only the rank answers them. Its workers end with it, even if killed.

    A worker that outlived its rank would hold the rank's connections open, so that its peers would wait.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
    heartbeat = heartbeat_file()
    if heartbeat is not None:  # its rank may die without a word: the agent removes what this worker leaves in memory
        with contextlib.suppress(OSError):
            heartbeat.with_name(f"worker-{os.getpid()}").touch()


def _first(batches: list[Any]) -> Any:
    return batches[0]


class Loader:
    """Batches for given keys, read in order, in worker processes when asked for."""

    def __init__(self, dataset: Dataset[Any], task: Task, options: Data, seed: int, pin: bool) -> None:
        """`pin`: batches go to a GPU, so put them into page-locked memory."""
        self.batches = BatchDataset(dataset, task, seed)
        self.pin = pin and options.pin_memory
        self.keys: Iterable[Keys] = ()
        self.workers: DataLoader[Any] | None = None
        if options.workers:
            self.workers = DataLoader(
                self.batches,  # type: ignore[arg-type]
                batch_sampler=_Keys(self),
                num_workers=options.workers,
                multiprocessing_context="fork",  # a rank's own default is a second fork server: 3 s, torch again
                prefetch_factor=options.prefetch,
                collate_fn=_first,
                pin_memory=self.pin,
                persistent_workers=True,
                worker_init_fn=_start_worker,
            )

    def read(self, keys: Iterable[Keys]) -> Iterator[Any]:
        """The batch of each of `keys`."""
        if self.workers is not None:
            self.keys = keys
            return iter(self.workers)
        batches = map(self.batches.__getitem__, keys)
        return (map_tensors(batch, Tensor.pin_memory) for batch in batches) if self.pin else batches

    def close(self) -> None:
        """End the workers; at exit multiprocessing would terminate them, which they ignore, and wait forever."""
        iterator: Any = getattr(self.workers, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # one that is stuck in user code


class _Keys:
    """A batch sampler whose batches are one key each: the worker makes the batch."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[Any]]:
        return ([keys] for keys in self.loader.keys)
