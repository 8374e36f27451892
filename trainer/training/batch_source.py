"""Where a session's batches come from: a dataset with numbered samples, in the exact order, or a stream of them."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, IterableDataset

from trainer.config.job import Data
from trainer.data.batches import collating
from trainer.data.datasets import count_samples, find_sample
from trainer.data.device_mover import DeviceMover
from trainer.data.loader import Loader
from trainer.data.sampler import MicroBatch, Position, Sampler
from trainer.data.stream import Stream
from trainer.errors import JobError
from trainer.parallel.base import Parallel

KEY = "session.batches"
Collate = Callable[[list[Any]], Any] | None


class BatchSource(Protocol):
    """What gives a session its batches."""

    count: int | None
    """Samples of an epoch, where that is known."""
    batch_size: int

    def read(self, position: Position, kept: dict[str, Any]) -> Iterator[tuple[MicroBatch, Any]]:
        """This rank's micro-batches from `position` to the end of its epoch; `kept`: what `place` said there."""

    def explain_start(self, position: Position, kept: dict[str, Any]) -> str:
        """How it finds its place, where that is not plain; else nothing."""

    def ends_after(self, position: Position, samples: int) -> bool:
        """Whether so many samples after `position` end the epoch."""

    def place(self) -> dict[str, Any]:
        """What to keep beside the position."""

    def close(self) -> None:
        """End what loads."""


class Numbered:
    """Batches of a dataset whose samples have numbers."""

    def __init__(self, dataset: Any, sampler: Sampler, collate: Collate, options: Data, parallel: Parallel) -> None:
        self.count: int | None = sampler.count
        self.batch_size, self.sampler = sampler.batch_size, sampler
        self.loader = Loader(dataset, collating(collate), options, sampler.seed, parallel.cuda, KEY)
        self.mover = DeviceMover(parallel.device, None, False, options.prefetch)

    def read(self, position: Position, kept: dict[str, Any]) -> Iterator[tuple[MicroBatch, Any]]:
        """See `BatchSource`."""
        plan, read = itertools.tee(self.sampler.epoch(Position(0, position.epoch, position.samples)))
        batches = self.mover.move(self.loader.read((micro.epoch, micro.indices) for micro in read))
        return zip(plan, batches, strict=True)

    def explain_start(self, position: Position, kept: dict[str, Any]) -> str:
        """See `BatchSource`."""
        return ""

    def ends_after(self, position: Position, samples: int) -> bool:
        """See `BatchSource`."""
        return position.samples + samples >= self.sampler.count

    def place(self) -> dict[str, Any]:
        """See `BatchSource`."""
        return {}

    def close(self) -> None:
        """See `BatchSource`."""
        self.loader.close()


class Streamed(Stream):
    """Batches of a stream."""

    count: int | None = None

    def ends_after(self, position: Position, samples: int) -> bool:
        """See `BatchSource`."""
        return self.last

    def close(self) -> None:
        """See `BatchSource`."""


def open_batches(
    dataset: Any, batch_size: int, accumulate: int, shuffle: bool, collate: Collate, options: Data, seed: int,
    parallel: Parallel,
) -> BatchSource:  # fmt: skip
    """The batches of a dataset. Raises JobError: it is none, or a number is wrong."""
    for key, value in (("batch_size", batch_size), ("accumulate", accumulate)):
        if not isinstance(value, int) or value < 1:
            raise JobError(f"{KEY}.{key}", value, "must be a whole number of at least 1", "Give one")
    if isinstance(dataset, DataLoader):
        remedy = "Give its dataset, and batch_size, collate and workers to session.batches"
        raise JobError(KEY, "DataLoader", "is a loader, whose order Muster could not control", remedy)
    rank, world_size = parallel.rank, parallel.world_size
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") or find_sample(dataset)):
        if not hasattr(dataset, "__iter__"):
            raise JobError(KEY, type(dataset).__name__, "is no dataset", "Give something to index or to iterate over")
        mover = DeviceMover(parallel.device, None, False, options.prefetch)
        return Streamed(dataset, batch_size, accumulate, collating(collate).collate, seed, rank, world_size, mover)
    count = count_samples(KEY, dataset)
    sampler = Sampler(count, batch_size, accumulate, rank, world_size, seed, shuffle)
    return Numbered(dataset, sampler, collate, options, parallel)
