"""Handwritten digits: the 1,797 real 8x8 images that scikit-learn bundles (UCI optical recognition test set).

Source: E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998. Read from scikit-learn's own file.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from trainer.task import Task


def load_digits() -> tuple[Tensor, Tensor]:
    """Images, float32 (1797, 1, 8, 8) in [0, 1], and labels, int64 (1797,), without the slow import of scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    table = np.loadtxt(Path(spec.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 8, 8) / 16
    return images, torch.from_numpy(table[:, -1]).long()


class Digits(Task):
    """Classify the digits; every fifth image is held out. `width`: channels of the first of two convolutions."""

    def __init__(self, width: int = 32) -> None:
        self.width = width
        self.images, self.labels = load_digits()
        self.held_out = torch.arange(len(self.labels)) % 5 == 4

    def prepare(self) -> None:
        """The images come with scikit-learn: there is nothing to prepare."""

    def model(self) -> nn.Module:
        width = self.width
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * width * 16, 10),
        )  # fmt: skip

    def train_dataset(self) -> TensorDataset:
        return TensorDataset(self.images[~self.held_out], self.labels[~self.held_out])

    def eval_dataset(self) -> TensorDataset:
        return TensorDataset(self.images[self.held_out], self.labels[self.held_out])

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(output, batch[1], reduction="none")

    def metrics(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"accuracy": output.argmax(1) == batch[1]}
