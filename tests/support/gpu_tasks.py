"""Tasks of the GPU tier."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from trainer.errors import JobError
from trainer.tasks.digits import Digits


class Normed(Digits):
    """With batch statistics."""

    def model(self) -> nn.Module:
        """A convolution, normalised, and a linear layer."""
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
        )  # fmt: skip


class Raising(Digits):
    """Rank 1 finds its job wrong after some steps."""

    left = 9

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Cross entropy of each image."""
        self.left -= 1
        if os.environ["RANK"] == "1" and not self.left:
            raise JobError("task_args.raising", 1, "on purpose", "None")
        return super().loss(output, batch)
