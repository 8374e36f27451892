"""Optimizer, learning-rate schedule and precision, as the job names them."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.job import Train
from trainer.errors import JobError
from trainer.task import find_object

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """Build the optimizer; vectors (biases, norms) are not decayed. torch's fused kernels are used.

    Raises JobError: the callable does not exist or refuses its arguments.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        problem = "the model has no parameter to train"
        raise JobError("task", type(model).__name__, problem, "Set requires_grad on at least one parameter")
    decay = train.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if decay and p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if not decay or p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # each is a call of the fused kernel, and 15 microseconds
    arguments = dict(train.optimizer_args)
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    kind: Any = OPTIMIZERS.get(train.optimizer)
    if kind is None:
        kind = find_object("train.optimizer", train.optimizer)
    elif not {"foreach", "fused"} & set(arguments):
        # The fused kernels know neither complex weights nor sparse gradients.
        arguments["fused"] = all(weight.is_floating_point() for weight in parameters) and not any(
            gives_sparse_gradients(part) for part in model.modules()
        )
    try:
        optimizer = kind(groups, lr=train.lr, **arguments)
    except (TypeError, ValueError) as error:
        raise JobError("train.optimizer_args", arguments, str(error), f"See {train.optimizer}'s arguments") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise JobError("train.optimizer", train.optimizer, "did not return a torch.optim.Optimizer", "Return one")
    return optimizer


def gives_sparse_gradients(module: nn.Module) -> bool:
    """Whether it is an embedding whose gradient holds the rows alone that a batch used."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse


def make_schedule(train: Train, steps: int) -> Callable[[int], float]:
    """The learning rate of each of `steps` steps, a pure function of the step: nothing to save, nothing to drift."""
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

    return rate


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group; a group with `lr_scale` gets that share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def autocast(precision: str, device: torch.device) -> Callable[[], Any] | None:
    """Makes what to enter around a forward pass, if anything."""
    return partial(torch.autocast, device.type, DTYPES[precision]) if precision in DTYPES else None


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16. Ranks agree on it without asking: they all see the averaged gradients' infinities.

    Raises JobError: fp16 without a GPU.
    """
    if precision != "fp16":
        return None
    if device.type != "cuda":
        raise JobError("train.precision", "fp16", "needs a GPU: CPU kernels lack it", "Use bf16 or float32")
    return torch.amp.GradScaler("cuda")


def copy_tensors(kept: Iterable[Tensor], new: Iterable[Tensor]) -> None:
    """Give tensors new values."""
    for old, value in zip(kept, new, strict=True):
        old.copy_(value)
