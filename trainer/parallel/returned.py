"""What a task returned, as tensors and numbers; what cannot be read as such is refused by name."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.errors import JobError

RESERVED = ("attempt", "event", "kind", "loss", "step", "time")
"""Names that a line of `metrics.jsonl` or an event has already."""
PER_SAMPLE = (
    'With torch losses use reduction="none", and average what remains over other dimensions; '
    "where the mean is over tokens or the like, return (sum, count)"
)


def read_losses(value: Any) -> Tensor:
    """Losses of shape (batch,), or sums and counts as the columns of shape (n, 2); float32 at least.

    Raises JobError: neither a loss for each sample nor a pair of sum and count.
    """
    if isinstance(value, tuple) and len(value) == 2:
        return _read_pair(*value)
    if not isinstance(value, Tensor):
        shown = value if value is None or isinstance(value, (int, float)) else f"a {type(value).__name__}"
        problem = "must be a tensor with one value per sample, shape (batch,), or a pair (sum, count)"
        several = isinstance(value, (Mapping, list, tuple))
        remedy = "Add several losses up; give their parts as metrics" if several else PER_SAMPLE
        raise JobError("task.loss", shown, problem, remedy)
    if value.dim() == 2 and value.shape[1] == 1:
        value = value.squeeze(1)
    if value.dim() != 1:
        problem = "must have one value per sample, shape (batch,)"
        raise JobError("task.loss", f"shape {tuple(value.shape)}", problem, PER_SAMPLE)
    return _to_float(value)


def _read_pair(total: Any, count: Any) -> Tensor:
    problem, remedy = "", "Return the sum of the losses, and of how many: numbers, or both of shape (batch,)"
    if isinstance(count, Tensor) and count.requires_grad:
        problem, remedy = (
            "the count has gradients: these seem to be two losses",
            "Add losses up before you return them",
        )
    elif not isinstance(total, Tensor) or not isinstance(count, (Tensor, int, float, np.generic)):
        problem = f"a pair of {type(total).__name__} and {type(count).__name__} is not (sum, count)"
    if problem:
        raise JobError("task.loss", "(sum, count)", problem, remedy)
    counts = torch.as_tensor(count, device=total.device).detach()
    total = _to_float(total.sum() if total.dim() == 1 and not counts.dim() else total)
    if total.dim() > 1 or total.shape != counts.shape:
        shapes = tuple(total.shape), tuple(counts.shape)
        raise JobError("task.loss", shapes, "are not the shapes of a pair (sum, count)", remedy)
    return torch.stack((total.reshape(-1), counts.reshape(-1).to(total.dtype)), 1)


def _to_float(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value  # a sum would keep three digits


def mean_loss(total: Tensor, count: int) -> float:
    """The mean of `count` losses that sum up to `total`; of sums and counts, which are a pair, theirs."""
    return float(total[0] / total[1]) if total.dim() else float(total) / count


def read_metrics(
    values: Any, count: int | None, device: torch.device, key: str = "task.metrics"
) -> dict[str, Tensor]:  # fmt: skip
    """Per-sample values, of `count` samples where that is known; `key`: how an error calls them.

    Raises JobError: no dictionary, or a value of another shape.
    """
    found = {}
    for name, value in _read_names(key, values).items():
        tensor = value
        if not isinstance(value, Tensor):
            try:
                tensor = torch.as_tensor(value, device=device)
            except (TypeError, ValueError, RuntimeError):
                shown = {name: value if value is None else type(value).__name__}
                raise JobError(key, shown, "is not numbers", "Return a tensor for each name") from None
        if not tensor.dim() or count not in (None, len(tensor)):
            raise wrong_metric(name, tensor, count, key)
        found[name] = tensor.detach()
    return found


def check_values(values: Mapping[str, Tensor], count: int) -> None:
    """Refuse losses and metrics of a batch that are not those of `count` samples. Raises JobError."""
    for name, value in values.items():
        if name == "loss":
            check_count(value, count)
        elif len(value) != count:
            raise wrong_metric(name, value, count)


def wrong_metric(name: str, value: Tensor, count: int | None, key: str = "task.metrics") -> JobError:
    """The error for a metric that is not one value per sample."""
    many = "each sample, shape (batch, ...)" if count is None else f"each of the {count} samples, shape ({count}, ...)"
    remedy = "Return the values themselves: sums and means are made of them"
    return JobError(key, {name: tuple(value.shape)}, f"must have a value for {many}", remedy)


def check_count(losses: Tensor, count: int) -> None:
    """Refuse losses that are not one for each of `count` samples, nor sums. Raises JobError: another number."""
    if losses.dim() == 1 and losses.shape[0] != count:
        remedy = "Average over pixels, tokens and the like inside Task.loss, or return (sum, count)"
        problem = f"must have one value for each of the {count} samples"
        raise JobError("task.loss", f"shape {tuple(losses.shape)}", problem, remedy)


def read_summary(values: Any, key: str = "task.summary") -> dict[str, float]:
    """The metrics to report: a number for each name. Raises JobError: something else, or a name that is ours."""
    return {name: _read_number(name, value, key) for name, value in _read_names(key, values).items()}


def _read_number(name: str, value: Any, key: str) -> float:
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and np.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, Real):
        return float(value)
    shown = {name: value if value is None else f"{type(value).__name__} {value}"}
    remedy = f"Give each of several numbers a name, such as {name}_0; return float('nan') for what is not known"
    raise JobError(key, shown, "must be one number", remedy)


def _read_names(key: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise JobError(key, values, "must be a dictionary of names and values", "Return {} for none")
    named = {str(name): value for name, value in values.items()}
    for name in RESERVED:
        if name in named and (name != "loss" or key.startswith("task.")):  # a task's loss is known
            remedy = f"Choose another name, such as my_{name}"
            raise JobError(key, name, "is a name that every line of metrics.jsonl has already", remedy)
    return named
