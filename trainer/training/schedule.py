"""The learning rate of each step, as the job names it, and what is refused in its place."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from trainer.config.job import Train
from trainer.errors import JobError
from trainer.task import find_object

FUNCTION = "Give a function (step, steps) -> factor: what it returns is multiplied with train.lr"


def make_schedule(train: Train, steps: int) -> Callable[[int], float]:
    """The learning rate of each of `steps` steps, a pure function of the step: nothing to save, nothing to drift.

    Raises JobError: a function of the user's is something else, or does not give such a rate.
    """
    own = train.schedule not in ("constant", "cosine", "linear")
    custom = find_object("train.schedule", train.schedule) if own else None
    warmup, floor = train.warmup_steps, train.min_lr_ratio

    def rate(step: int) -> float:
        if step < warmup:
            return train.lr * (step + 1) / (warmup + 1)
        if custom is not None:
            return train.lr * float(custom(step, steps))
        if train.schedule == "constant":
            return train.lr
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        shape = 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return train.lr * (floor + (1 - floor) * shape)

    if own:
        _check(train.schedule, custom, steps)
    return rate


def _check(name: str, custom: Any, steps: int) -> None:
    """Ask a schedule for some steps, twice. Raises JobError: it is a scheduler of torch's, or gives no factor."""
    if isinstance(custom, LRScheduler) or (isinstance(custom, type) and issubclass(custom, LRScheduler)):
        problem = "is a torch scheduler, which counts steps by itself and changes an optimizer"
        raise JobError("train.schedule", name, problem, FUNCTION)
    for step in sorted({0, steps // 2, steps - 1}):
        try:
            factors = [float(custom(step, steps)) for _ in range(2)]
        except Exception as error:
            problem = f"cannot be asked for step {step} of {steps} ({type(error).__name__}: {error})"
            raise JobError("train.schedule", name, problem, FUNCTION) from error
        if not all(0 <= factor < math.inf for factor in factors):
            raise JobError("train.schedule", name, f"gives {factors[0]} for step {step} of {steps}", FUNCTION)
        if factors[0] != factors[1]:
            problem = f"gives {factors[0]} for step {step}, then {factors[1]}: a resumed run would have other rates"
            raise JobError("train.schedule", name, problem, "Let it depend on its arguments alone")
