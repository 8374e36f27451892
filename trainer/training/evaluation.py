"""Exact evaluation: each held-out sample once, sums in a fixed order, so every world size gives the same numbers."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.device_mover import DeviceMover
from trainer.data.loader import Loader
from trainer.data.nested import map_tensors
from trainer.data.sampler import evaluation_batches
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.module_state import evaluation_mode
from trainer.task import Task
from trainer.training.determinism import any_kernels


def evaluate(
    parallel: Parallel, model: nn.Module, task: Task, loader: Loader, mover: DeviceMover, count: int, batch_size: int,
    stop: Callable[[], bool], seed: Callable[[int], None],
) -> dict[str, float] | None:  # fmt: skip
    """Evaluate `model` in the place of the step's own on all `count` samples; None when the ranks agreed to stop.

    `stop` is asked before each round of batches, on all ranks alike. `seed` is told the number of each batch before
    it is computed, and one more for the summary: what draws random numbers gives the same at any world size too.
    """
    plan = list(evaluation_batches(count, batch_size, parallel.rank, parallel.world_size))
    rounds = math.ceil(math.ceil(count / batch_size) / parallel.world_size)
    batches = mover.move(loader.read([(0, indices) for _, indices in plan]))
    sums: list[tuple[int, dict[str, Tensor]]] = []
    step, own = parallel.step, parallel.step.model
    step.model = model
    parallel.share_buffers()
    try:
        with evaluation_mode(step), torch.no_grad(), any_kernels():
            for turn in range(rounds):
                if parallel.any(stop()):
                    return None
                if turn < len(plan):
                    number, indices = plan[turn]
                    batch = next(batches)
                    seed(number)
                    values = parallel.module(batch, True)
                    check_count(values["loss"], len(indices))
                    # Float64 sums of float32 values are exact enough; a fixed order makes them equal bit by bit.
                    sums.append((number, {k: v.double().sum(0) for k, v in values.items()}))
    finally:
        step.model = own
    parts = parallel.gather_objects(map_tensors(sums, Tensor.cpu))
    every: list[dict[str, Any]] = [values for _, values in sorted(itertools.chain(*parts), key=lambda item: item[0])]
    total = {key: functools.reduce(torch.add, (values[key] for values in every)) for key in every[0]}
    loss = float(total.pop("loss")) / count
    seed(len(every))
    return {"loss": loss, **task.summary(total, count)}


def check_count(losses: Tensor, count: int) -> None:
    """Refuse losses that are not one for each of `count` samples. Raises JobError: another number."""
    if losses.shape[0] != count:
        remedy = "Average over pixels, tokens and the like inside Task.loss"
        raise JobError("task.loss", tuple(losses.shape), f"must have one value for each of the {count} samples", remedy)
