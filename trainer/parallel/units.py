"""The layers of a model that are handled one at a time: gathered by fsdp, compiled, computed again for gradients.

A layer that is called as a module is one; a part whose weights another one uses without calling it is none.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.config.job import Job
from trainer.errors import JobError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""What calls its parts, or lets the model do it."""
Units = dict[str, nn.Module]


def find_units(
    model: nn.Module, given: Iterable[nn.Module] | None, least: int, key: str = "task.shard_modules"
) -> Units:  # fmt: skip
    """The layers that are `given`, else those in containers with at least so many weights; inner ones come first.

    Raises JobError: what is given is no part of the model, or shares weights with another part; `key`: by whom it is.
    """
    names = {id(part): name for name, part in model.named_modules()}
    chosen = {id(part) for part in (_large_parts(model, least) if given is None else given)}
    strange = chosen - names.keys() | ({id(model)} & chosen)
    if strange:
        problem = "names a module that is not a part of the model"
        raise JobError(key, f"{len(strange)} of {len(chosen)}", problem, "Return parts of `model`")
    units = {name: part for name, part in reversed([*model.named_modules()]) if id(part) in chosen}
    for name in [name for name, part in units.items() if _shares_weights(part, model)]:
        if given is not None:
            problem, remedy = "shares weights with a part that is outside of it", "Name a module that holds both"
            raise JobError(key, name, problem, remedy)
        del units[name]
    return units


def _large_parts(module: nn.Module, least: int) -> Iterator[nn.Module]:
    """The parts of the outermost containers; a container in a container is looked into."""
    for part in module.children():
        if isinstance(part, CONTAINERS) or not isinstance(module, CONTAINERS):
            yield from _large_parts(part, least)
        elif sum(weight.numel() for weight in part.parameters()) >= least:
            yield part


def _shares_weights(part: nn.Module, model: nn.Module) -> bool:
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    inside = Counter(id(weight) for _, weight in part.named_parameters(remove_duplicate=False))
    return any(uses[key] > count for key, count in inside.items())


def recompute_in_backward(units: Units, job: Job) -> None:
    """Keep no activations inside of these layers. Raises JobError: there are none."""
    if not units:
        problem = f"finds no layer with at least {job.fsdp.min_params} weights in a Sequential or ModuleList"
        raise JobError("train.checkpoint_activations", True, problem, "Name the layers in Task.shard_modules")
    for part in units.values():
        replace_forward(part, recompute)


def recompute(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that is computed again for the gradients."""
    return partial(checkpoint, forward, use_reentrant=False)


def replace_forward(module: nn.Module, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Give a module another forward, by another class: copies of the module have it, too, each with itself."""
    kind: Any = type(module)
    module.__class__ = _changed_class(kind, change)


@cache
def _changed_class(kind: Any, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> type[nn.Module]:
    """One for all modules of a class, so that what is compiled for one of them serves all."""
    changed = change(kind.forward)
    own = {"forward": lambda self, *given, **named: changed(self, *given, **named), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), own)
