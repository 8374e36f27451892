"""What is trained: a model, its data, a loss and metrics. This one tells three kinds of flowers apart."""

from typing import Any

import torch
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import muster

Batch = tuple[Tensor, Tensor]


class Training(muster.Task):
    """Knows nothing of ranks, devices or clusters."""

    def __init__(self, width: int = 32) -> None:
        """`task_args` of the job file sets these."""
        self.width = width

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, self.width), nn.ReLU(), nn.Linear(self.width, 3))

    def train_dataset(self) -> Dataset[Any]:
        return flowers(held_out=False)

    def eval_dataset(self) -> Dataset[Any]:
        return flowers(held_out=True)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """One value per sample."""
        return functional.cross_entropy(output, batch[1], reduction="none")

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """One value per sample for each name."""
        return {"accuracy": (output.argmax(1) == batch[1]).float()}


def flowers(held_out: bool) -> Dataset[Any]:
    """Every fifth is held out."""
    data = load_iris()
    chosen = (torch.arange(len(data.target)) % 5 == 4) == held_out
    return TensorDataset(torch.tensor(data.data, dtype=torch.float32)[chosen], torch.tensor(data.target)[chosen])
