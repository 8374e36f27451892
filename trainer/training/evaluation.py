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
from trainer.parallel.returned import check_values, mean_loss, read_summary
from trainer.task import Task
from trainer.training.determinism import any_kernels

UNCOUNTED = 2**31
"""The number of a batch that is computed for the sake of other ranks."""
Sums = dict[str, Tensor]
"""Of the loss and the metrics of one batch."""


def evaluate(
    parallel: Parallel, model: nn.Module, loader: Loader, mover: DeviceMover, count: int, batch_size: int,
    stop: Callable[[], bool], seed: Callable[[int], None],
) -> list[Sums] | None:  # fmt: skip
    """Evaluate `model` in the place of the step's own on all `count` samples; None when the ranks agreed to stop.

    The sums of all batches, in their order, on all ranks. `stop` is asked before each round of batches, on all ranks
    alike. `seed` is told the number of each batch before it is computed, so what draws random numbers gives the same
    at any world size too.
    """
    plan = list(evaluation_batches(count, batch_size, parallel.part, parallel.parts))
    rounds = math.ceil(math.ceil(count / batch_size) / parallel.parts)
    if parallel.lockstep and len(plan) < rounds:  # what a rank without a batch computes then does not count
        plan.append((UNCOUNTED, next(iter(evaluation_batches(count, batch_size, 0, parallel.parts)))[1]))
    batches = mover.move(loader.read([(0, indices) for _, indices in plan]))
    sums: list[tuple[int, dict[str, Tensor]]] = []
    step, own = parallel.step, parallel.step.model
    step.model = model
    parallel.share_buffers([step.model])
    try:
        with evaluation_mode(model), any_kernels():
            for turn in range(rounds):
                if stop():
                    return None
                if turn < len(plan):
                    number, indices = plan[turn]
                    batch = next(batches)
                    values = evaluate_batch(parallel, batch, len(indices), functools.partial(seed, number))
                    # Float64 sums of float32 values are exact enough; a fixed order makes them equal bit by bit.
                    if parallel.speaks and number != UNCOUNTED:
                        sums.append((number, {k: v.double().sum(0) for k, v in values.items()}))
    finally:
        step.model = own
    parts = parallel.gather(map_tensors(sums, Tensor.cpu))
    return [values for _, values in sorted(itertools.chain(*parts), key=lambda item: item[0])]


def summarize(task: Task, every: list[Sums], count: int) -> dict[str, float]:
    """The mean loss and the task's metrics, from the sums of all batches. Raises JobError: on all ranks alike."""
    names = set(itertools.chain(*every))
    missing = {name for name in names if not all(name in values for values in every)}
    if missing:
        remedy = "Return the same names for each batch, with zeros where there is nothing to count"
        raise JobError("task.metrics", ", ".join(sorted(missing)), "is missing in some batches", remedy)
    total = {key: functools.reduce(torch.add, (values[key] for values in every)) for key in every[0]}
    loss = mean_loss(total.pop("loss"), count)
    return {"loss": loss, **read_summary(task.summary(total, count))}


def evaluate_batch(parallel: Parallel, batch: Any, count: int, seed: Callable[[], None]) -> dict[str, Tensor]:
    """Losses and metrics of a batch of `count` samples; `seed` is called before they are computed.

    Without gradients, unless a loss is found to need them, such as one with a derivative by the input.
    """
    step = parallel.step
    seed()
    try:
        with torch.set_grad_enabled(step.needs_gradients):
            values: dict[str, Tensor] = parallel.compute(batch, count, True)
    except RuntimeError as error:
        if step.needs_gradients or "does not require grad" not in str(error):
            raise
        step.needs_gradients = True
        return evaluate_batch(parallel, batch, count, seed)
    check_values(values, count)
    return {name: value.detach() for name, value in values.items()}
