"""Which sample is used when and by whom: a function of (seed, epoch) alone, whatever the number of ranks.

Nothing here touches data or devices; a resume needs only (epoch, samples consumed globally).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass
class Position:
    """Where a training stands, counted globally: the same at any world size."""

    step: int = 0
    epoch: int = 0
    samples: int = 0
    """Consumed in this epoch by all ranks together."""

    def after(self, samples: int, count: int) -> "Position":
        """One step of `samples` further, in the next epoch if all `count` of this one are consumed."""
        over = self.samples + samples >= count
        return Position(self.step + 1, self.epoch + over, 0 if over else self.samples + samples)


def epoch_order(seed: int, epoch: int, count: int) -> Indices:
    """The order of `count` samples in an epoch, shape (count,).

    `RandomState` and not `Generator`: NumPy promises its stream never changes, so an old run resumes exactly
    under a newer NumPy (NEP 19).
    """
    return np.random.RandomState([seed, epoch]).permutation(count).astype(np.int64)


@dataclass(slots=True)  # not frozen: that takes four times as long to make
class MicroBatch:
    """What one rank computes at once."""

    epoch: int
    indices: Indices
    """At least one: a rank whose share is empty computes a sample of the step with weight zero."""
    count: int
    """How many of them count: the first ones, mostly all, or none."""
    step_count: int
    """Samples of the whole step, over all ranks and micro-batches."""
    last: bool
    """Whether the step's update follows."""


def share_of(samples: int, part: int, parts: int) -> tuple[int, int]:
    """Where a part of a global batch begins and ends: contiguous, sizes differ by one at most, and some may be 0."""
    return part * samples // parts, (part + 1) * samples // parts


@dataclass(frozen=True)
class Sampler:
    """The samples of one part among `parts` of each global batch, in steps of the global batch; part -1 has none."""

    count: int
    batch_size: int
    accumulate: int
    part: int
    parts: int
    seed: int
    shuffle: bool = True
    least: int = 1
    """Samples of a micro-batch: to a smaller one its first is added again and again, and does not count."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that use every sample once; the last may be smaller than the others."""
        return -(-self.count // self.batch_size)

    def epoch(self, position: Position) -> Iterator[MicroBatch]:
        """This part's micro-batches from `position` to the end of its epoch."""
        epoch = position.epoch
        parts = self.accumulate * self.parts
        order = epoch_order(self.seed, epoch, self.count) if self.shuffle else np.arange(self.count, dtype=np.int64)
        for start in range(position.samples, self.count, self.batch_size):
            stop = min(start + self.batch_size, self.count)
            for micro in range(self.accumulate):
                first, last = (0, 0) if self.part < 0 else share_of(stop - start, micro * self.parts + self.part, parts)
                indices = order[start + first : start + last] if last > first else order[start : start + 1]
                if self.least > len(indices):
                    indices = np.concatenate((indices, np.repeat(indices[:1], self.least - len(indices))))
                yield MicroBatch(epoch, indices, last - first, stop - start, micro == self.accumulate - 1)


def evaluation_batches(count: int, batch_size: int, rank: int, world_size: int) -> Iterator[tuple[int, Indices]]:
    """This rank's numbered batches of an exact evaluation.

    Batches are cut before they are dealt out, so each is the same at any world size and its sums are, bit by bit.
    """
    for number, start in enumerate(range(0, count, batch_size)):
        if number % world_size == rank:
            yield number, np.arange(start, min(start + batch_size, count), dtype=np.int64)
