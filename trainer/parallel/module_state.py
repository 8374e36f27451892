"""What of a user's module is state besides its parameters: modes, buffers, numbers. Kept, put back, added."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

NUMBERS = (bool, int, float)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; afterwards each part has the mode that it had: what the user froze stays frozen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train()  # not the flags alone: the user's own method may do more, such as split merged weights
        for part, training in modes:
            part.training = training


def is_dense(tensor: Tensor) -> bool:
    """Whether it has one number after the other in memory: a sparse one has no strides, and no collective takes it."""
    return tensor.layout is torch.strided


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are in the model's state dict, by all their names."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved}


def put_buffer(model: nn.Module, name: str, value: Tensor, persistent: bool) -> None:
    """Make `value` the buffer called `name`. Raises AttributeError: the model has no such module."""
    owner, _, own = name.rpartition(".")
    model.get_submodule(owner).register_buffer(own, value, persistent)


def buffers_beside(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint says of the buffers beside the state dict: which of its names are buffers, and what it lacks.

    Buffers that are not persistent are state as well, as far as a forward pass changes them.
    """
    saved = saved_buffers(model)
    others = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    return {"saved": list(saved), "others": others}


def restore_buffers(model: nn.Module, weights: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
    """Give a model the buffers that it had: those that a forward pass made or replaced by larger ones, then the rest.

    `weights`: its state dict, which can be loaded afterwards; `beside`: see `buffers_beside`.
    """
    own = dict(model.named_buffers(remove_duplicate=False))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    others: Mapping[str, Tensor] = beside["others"]
    for name, value in [*((name, weights[name]) for name in beside["saved"] if name in weights), *others.items()]:
        now, persistent = own.get(name), name not in others
        with suppress(AttributeError):  # no such module any more: loading the weights tells
            if now is None or (persistent and now.shape != value.shape):
                put_buffer(model, name, value.to(device, copy=True), persistent)
            elif not persistent and now.shape == value.shape:
                now.copy_(value)


Numbers = dict[str, dict[str, Any]]


def numbers(model: nn.Module) -> Numbers:
    """The attributes of each part that are numbers or flags, such as what its forward pass counts; not its mode."""
    return {
        name: {key: value for key, value in vars(part).items() if type(value) in NUMBERS and key != "training"}
        for name, part in model.named_modules()
    }


def changed_numbers(model: nn.Module, before: Numbers) -> Numbers:
    """Those that are others than `before`."""
    now = {
        name: {key: value for key, value in values.items() if before.get(name, {}).get(key, NUMBERS) != value}
        for name, values in numbers(model).items()
    }
    return {name: values for name, values in now.items() if values}


def restore_numbers(model: nn.Module, saved: Numbers) -> None:
    """Give the parts of a model numbers that they had."""
    for name, part in model.named_modules():
        vars(part).update(saved.get(name, {}))
