"""Tasks of the gloo tier whose data, or whose mistakes, are peculiar."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from digit_tasks import IMAGES, LABELS, Small
from torch import Tensor
from torch.utils.data import Dataset

Sample = tuple[Tensor, Tensor]


class Images(Dataset[Sample]):
    """Digits one by one."""

    def __init__(self, count: int, journal: bool) -> None:
        """`journal`: print what is random."""
        self.count, self.journal = count, journal

    def __len__(self) -> int:
        """As many as asked for."""
        return self.count

    def shifted(self, index: int, rows: int, columns: int, noise: float) -> Sample:
        """An image moved a little."""
        if self.journal:
            print(f"shift of {index}: {rows} {columns} {noise}", flush=True)
        return torch.roll(IMAGES[index], (rows, columns), (1, 2)) + noise, LABELS[index]


class OwnGenerator(Images):
    """Augmentation as the documentation recommends it."""

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Of the generator alone."""
        return self.shifted(index, int(rng.integers(3)), int(rng.integers(3)), float(rng.normal()) * 0.01)


class GlobalGenerators(Images):
    """Augmentation as libraries such as torchvision do it."""

    def __getitem__(self, index: int) -> Sample:
        """Of three global generators."""
        return self.shifted(index, random.randrange(3), np.random.randint(3), float(torch.randn(())) * 0.01)


class Shifted(Small):
    """Augmented by a generator of the sample's own."""

    kind: type[Images] = OwnGenerator

    def __init__(self, dropout: float = 0.0, journal: bool = False) -> None:
        """As `Small` and `Images`."""
        super().__init__(dropout=dropout)
        self.journal = journal

    def train_dataset(self) -> Any:
        """Different in each epoch."""
        return self.kind(self.count, self.journal)


class GloballyShifted(Shifted):
    """Augmented by global generators."""

    kind = GlobalGenerators


class Unreadable(Small):
    """A file is broken."""

    def train_dataset(self) -> Any:
        """All but one can be read."""
        return Broken(self.count, False)


class Broken(Images):
    """Image 40 cannot be read."""

    deterministic = True

    def __getitem__(self, index: int) -> Sample:
        """Unless it is that one."""
        if index == 40:
            raise OSError("image 40 cannot be read")
        return IMAGES[index], LABELS[index]


class Misshapen(Small):
    """Losses or metrics that are not one per sample."""

    def __init__(self, shape: str) -> None:
        """Which mistake."""
        super().__init__()
        self.shape = shape

    def loss(self, output: Tensor, batch: Sample) -> Tensor:
        """Of the shape that was asked for."""
        losses = super().loss(output, batch)
        return {"mean": losses.mean(), "twice": losses.repeat(2), "classes": output}.get(self.shape, losses)

    def metrics(self, output: Tensor, batch: Sample) -> Mapping[str, Tensor]:
        """A share where counts belong."""
        return {"share": (output.argmax(1) == batch[1]).double().mean()}
