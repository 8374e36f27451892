"""Optimizer, the learning rates of its groups, and precision, as the job names them."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer.config.job import Train
from trainer.errors import JobError
from trainer.parallel.shards import part_of
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
        # The fused kernels know neither complex weights nor sparse gradients, and that of SGD knows no shards.
        unknown = any(gives_sparse_gradients(part) for part in model.modules()) or (
            kind is torch.optim.SGD and any(part_of(weight) is not None for weight in parameters)
        )
        arguments["fused"] = all(weight.is_floating_point() for weight in parameters) and not unknown
    try:
        optimizer = kind(groups, lr=train.lr, **arguments)
    except (TypeError, ValueError) as error:
        raise JobError("train.optimizer_args", arguments, str(error), f"See {train.optimizer}'s arguments") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise JobError("train.optimizer", train.optimizer, "did not return a torch.optim.Optimizer", "Return one")
    check_step(train, optimizer)
    return optimizer


def gives_sparse_gradients(module: nn.Module) -> bool:
    """Whether it is an embedding whose gradient holds the rows alone that a batch used."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse


def check_step(train: Train, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose update computes losses itself. Raises JobError: it asks for a function that does."""
    parameters = inspect.signature(optimizer.step).parameters.values()
    if any(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters):
        problem, remedy = "its step() needs a closure, which Muster does not give it", "Choose another, or use a script"
        raise JobError("train.optimizer", train.optimizer, problem, remedy)


class Rates:
    """The learning rate of each group: its share of the schedule's."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """A share is the group's `lr_scale`, else what its own rate is of `train.lr`, the rate it was built with."""
        self.optimizer = optimizer
        self.shares = [self._share(group, lr) for group in optimizer.param_groups]

    @staticmethod
    def _share(group: dict[str, Any], lr: float) -> float | None:
        if "lr_scale" in group:
            return float(group["lr_scale"])
        own = group.get("lr")
        return None if own is None else 1.0 if own == lr else float(own) / lr

    def set(self, rate: float) -> float:
        """Set the rates of a step, and return the first group's; an optimizer that has none chooses its own."""
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            if share is not None:
                group["lr"] = rate * share
        return rate if self.shares[0] is None else rate * self.shares[0]


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
