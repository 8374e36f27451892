"""Exact evaluation: each held-out sample once, sums in a fixed order, so every world size gives the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.device_mover import DeviceMover
from trainer.data.loader import Loader
from trainer.data.sampler import evaluation_batches
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.step import Step
from trainer.task import Task


def evaluate(
    parallel: Parallel, task: Task, loader: Loader, mover: DeviceMover, count: int, batch_size: int,
    stop: Callable[[], bool], seed: Callable[[int], None],
) -> dict[str, float] | None:  # fmt: skip
    """Evaluate the wrapped model on all `count` samples; None when the ranks agreed to stop on the way.

    `stop` is asked before each round of batches, on all ranks alike. `seed` is told the number of each batch before
    it is computed, and one more for the summary: what draws random numbers gives the same at any world size too.
    """
    plan = list(evaluation_batches(count, batch_size, parallel.rank, parallel.world_size))
    rounds = math.ceil(math.ceil(count / batch_size) / parallel.world_size)
    batches = mover.move(loader.read([(0, indices) for _, indices in plan]))
    sums: list[tuple[int, dict[str, Tensor]]] = []
    parallel.step.eval()
    try:
        with torch.no_grad():
            for turn in range(rounds):
                if parallel.any(stop()):
                    return None
                if turn < len(plan):
                    number, indices = plan[turn]
                    batch = next(batches)
                    seed(number)
                    values = parallel.evaluate(batch)
                    check_count(values["loss"], len(indices))
                    # Float64 sums of float32 values are exact enough; a fixed order makes them equal bit by bit.
                    sums.append((number, {k: v.double().sum(0) for k, v in values.items()}))
    finally:
        parallel.step.train()
    every: list[tuple[int, dict[str, Any]]] = sorted(
        (item for part in parallel.gather_objects(_on_cpu(sums)) for item in part), key=lambda item: item[0]
    )
    total = every[0][1]
    for _, part in every[1:]:
        total = {key: total[key] + part[key] for key in total}
    loss = float(total.pop("loss")) / count
    seed(len(every))
    return {"loss": loss, **task.summary(total, count)}


@contextmanager
def computing_with(model: nn.Module | None, step: Step) -> Iterator[None]:
    """Let the step's module compute with another model, such as the average of weights; None: with its own."""
    own = step.model
    if model is not None:
        step.model = model
    try:
        yield
    finally:
        step.model = own


def check_count(losses: Tensor, count: int) -> None:
    """Refuse losses that are not one for each of `count` samples: their mean would be over something else.

    Raises:
        JobError: another number.
    """
    if losses.shape[0] != count:
        raise JobError(
            "task.loss",
            tuple(losses.shape),
            f"must have one value for each of the {count} samples",
            "Average over pixels, tokens and the like inside Task.loss",
        )


def _on_cpu(sums: list[tuple[int, dict[str, Tensor]]]) -> list[tuple[int, dict[str, Tensor]]]:
    return [(number, {key: value.cpu() for key, value in values.items()}) for number, values in sums]
