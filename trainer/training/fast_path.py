"""What goes around a public call of torch because that call costs at least 2 % of a step of 3 ms on a CPU.

Each has the public call as its fallback. Here stands what reaches into torch, and nothing else does so for speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks as post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as pre_hooks

KINDS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def make_step(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """What to call for an update: `optimizer.step`, or what is inside its wrappers.

    torch wraps the step of its own optimizers for hooks, for traces and for its compiler: 4 % of a step of 3 ms. Hooks
    for all optimizers are looked for (two private names: torch has no other way to list them); nobody but the loop has
    this optimizer, so it has none of its own.
    """
    kind: Any = type(optimizer)
    wrapped: Any = getattr(getattr(kind.step, "__wrapped__", None), "__wrapped__", None)
    if kind not in KINDS or wrapped is None or pre_hooks or post_hooks:
        return optimizer.step

    def step() -> None:
        with torch.no_grad():
            wrapped(optimizer)

    return step
