"""A user's own optimizer and schedule, as the job file names them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class lion(torch.optim.Optimizer):
    """The sign of a mixture of momentum and gradient (Chen et al. 2023, arXiv 2302.06675)."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr / 10, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                mixed = momentum.lerp(weight.grad, 1 - group["betas"][0])
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(0.1 * group["lr"] * mixed.sign())
                momentum.lerp_(weight.grad, 1 - group["betas"][1])


def steps(step: int, total: int) -> float:
    """A third of the rate after each third of the steps."""
    return float(3.0 ** -(3 * step // total))
