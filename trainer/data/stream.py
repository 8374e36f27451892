"""Batches of a stream: samples that can only be iterated over, such as those of an `IterableDataset`.

Every rank reads the whole stream and takes its share of each global batch, so the order is the same at any number of
ranks. A training goes on at its place in the stream: by the stream's own `state_dict` where it has one (the convention
of torchdata and of Hugging Face's datasets), else by reading again what was used, and dropping it.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trainer.data.device_mover import DeviceMover
from trainer.data.rng import derive_seed, seed_generators
from trainer.data.sampler import MicroBatch, Position, share_of

MARK = 10
"""Batches between two states of the stream that are kept: what was read since is read again."""


class Stream:
    """The batches of one rank."""

    def __init__(
        self, dataset: Any, batch_size: int, accumulate: int, collate: Callable[[list[Any]], Any], seed: int,
        rank: int, world_size: int, mover: DeviceMover,
    ) -> None:  # fmt: skip
        self.dataset, self.batch_size, self.accumulate, self.collate = dataset, batch_size, accumulate, collate
        self.seed, self.rank, self.world_size, self.mover = seed, rank, world_size, mover
        self.has_state = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        self.mark: dict[str, Any] = {}
        """The newest state of the stream that is kept, and how many samples of the epoch come before it."""
        self.last = False
        """Whether the batch that was given last ends the epoch."""

    def place(self) -> dict[str, Any]:
        """What to keep, to go on from here."""
        return self.mark

    def explain_start(self, position: Position, kept: dict[str, Any]) -> str:
        """How the stream gets to the place where a training goes on; nothing at the beginning of an epoch."""
        again = position.samples - (kept["samples"] if kept else 0)
        if not position.samples:
            return ""
        kind = type(self.dataset).__name__
        if kept:
            return f"{kind} goes on by its state_dict, and skips {again} samples that were used since"
        if self.has_state:
            return f"{kind} reads again the {again} samples that were used: its state is kept every {MARK} batches"
        return f"{kind} reads again the {again} samples that were used: it has no state_dict to go on by"

    def read(self, position: Position, kept: dict[str, Any]) -> Iterator[tuple[MicroBatch, Any]]:
        """This rank's micro-batches from `position` to the end of its epoch; `kept`: the place of an earlier start."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(position.epoch)
        self.mark = {}
        done = 0
        if kept:
            self.dataset.load_state_dict(kept["state"])
            self.mark, done = kept, kept["samples"]
        seed_generators(derive_seed(self.seed, position.epoch, 0))
        samples = iter(self.dataset)
        while done < position.samples:  # as when they were used, because the stream may shuffle what it has read
            size = min(self.batch_size, position.samples - done)
            done += len(self._next(samples, position.epoch, done, size)) or position.samples
        if self.has_state and done > self.mark.get("samples", 0):
            self.mark = self._mark(done)
        yield from self._batches(samples, position)

    def _batches(self, samples: Iterator[Any], start: Position) -> Iterator[tuple[MicroBatch, Any]]:
        done, epoch = start.samples, start.epoch
        batch = self._next(samples, epoch, done, self.batch_size)
        while batch:
            end, mark = done + len(batch), self.mark
            if self.has_state and end // self.batch_size % MARK == 0:
                mark = self._mark(end)
            following = self._next(samples, epoch, end, self.batch_size)
            self.last = not following
            yield from self._cut(batch, epoch, done)
            self.mark, done, batch = mark, end, following

    def _mark(self, samples: int) -> dict[str, Any]:
        """The state of the stream now that so many samples of the epoch are read."""
        return {"state": copy.deepcopy(self.dataset.state_dict()), "samples": samples}

    def _next(self, samples: Iterator[Any], epoch: int, done: int, size: int) -> list[Any]:
        """The samples of the next global batch, drawn as on all ranks."""
        seed_generators(derive_seed(self.seed, epoch, done))
        return list(itertools.islice(samples, size))

    def _cut(self, batch: list[Any], epoch: int, done: int) -> Iterator[tuple[MicroBatch, Any]]:
        parts = self.accumulate * self.world_size
        for micro in range(self.accumulate):
            first, last = share_of(len(batch), micro * self.world_size + self.rank, parts)
            place = slice(first, last) if last > first else slice(0, 1)
            indices = np.arange(done + place.start, done + place.stop, dtype=np.int64)
            [moved] = self.mover.move(iter([self.collate(batch[place])]))
            end = micro == self.accumulate - 1
            yield MicroBatch(epoch, indices, last - first, len(batch), end), moved
