"""A step before the first one that changes nothing, for modes that arrange themselves by their first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.parallel.base import Parallel


def warm_up(parallel: Parallel, model: nn.Module, batch: Any) -> None:
    """Let the mode compute a step (see `Distributed.warm_up`); buffers are put back, gradients are left to the caller.

    The peak of memory is counted from then on.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    parallel.warm_up(batch)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    if parallel.cuda:
        for device in parallel.devices:
            torch.cuda.reset_peak_memory_stats(device)
