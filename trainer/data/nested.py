"""Batches are nested as user code likes: one walk over them for whatever is to be done with their tensors."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

INSIDE: Any = object()
"""What the function of `walk` returns for a part that it does not replace as a whole."""
CLOSED = (str, bytes, int, float, type, FunctionType, ModuleType, nn.Module, type(None))
"""What holds nothing of a batch."""


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same batch with `function` applied to each tensor."""
    return walk(batch, lambda part: function(part) if isinstance(part, Tensor) else INSIDE)


def walk(part: Any, replace: Callable[[Any], Any], deep: bool = True) -> Any:
    """The same batch with parts replaced; `replace` is asked from the outside in, and may say `INSIDE`.

    Mappings, tuples with and without names, lists, dataclasses and other objects with attributes keep their types, and
    are copied where something in them changes. `deep`: also objects within an object, which may lead in circles.
    """
    new = replace(part)
    if new is not INSIDE:
        return new
    if isinstance(part, CLOSED):
        return part
    if isinstance(part, (dict, UserDict)):
        changed = _changes(part, replace, deep)
        kept = copy.copy(part) if changed else part  # a subclass may have more to it than its items
        for key, value in changed.items():
            kept[key] = value
        return kept
    if isinstance(part, PackedSequence):  # torch wants its batch sizes on the CPU
        ends = (walk(each, replace) for each in (part.sorted_indices, part.unsorted_indices))
        return type(part)(walk(part.data, replace), part.batch_sizes, *ends)
    if isinstance(part, (tuple, list)):
        items = [walk(value, replace, deep) for value in part]
        if all(new is old for new, old in zip(items, part, strict=True)):
            return part
        if isinstance(part, tuple):
            return type(part)(*items) if hasattr(part, "_fields") else type(part)(items)
        filled = copy.copy(part)
        filled[:] = items
        return filled
    if callable(getattr(part, "apply", None)) and callable(getattr(part, "to", None)):  # such as a graph
        return copy.copy(part).apply(lambda tensor: walk(tensor, replace))
    attributes = read_attributes(part)
    if isinstance(part, Mapping) and not attributes:
        changed = _changes(part, replace, deep)
        return {**part, **changed} if changed else part
    if not deep and not dataclasses.is_dataclass(part):
        return part
    changed = _changes(attributes, replace, False)
    kept = copy.copy(part) if changed else part
    for name, value in changed.items():
        object.__setattr__(kept, name, value)  # also of a frozen dataclass
    return kept


def _changes(values: Mapping[Any, Any], replace: Callable[[Any], Any], deep: bool) -> dict[Any, Any]:
    """The values that are others after the walk."""
    walked = {key: walk(value, replace, deep) for key, value in values.items()}
    return {key: value for key, value in walked.items() if value is not values[key]}


def read_attributes(part: Any) -> dict[str, Any]:
    """What an object has of its own; of a dataclass with slots, its fields."""
    found = dict(attributes_of(part))
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        if hasattr(part, field.name):
            found[field.name] = getattr(part, field.name)
    return found


def attributes_of(part: Any) -> dict[str, Any]:
    """The dictionary of an object's attributes, empty without one. Its `__getattr__` may do anything: not asked."""
    try:
        found: dict[str, Any] = object.__getattribute__(part, "__dict__")
    except AttributeError:
        return {}
    return found


def leaves(batch: Any) -> list[Any]:
    """All tensors, arrays, texts and numbers of a batch, in order."""
    found: list[Any] = []

    def take(part: Any) -> Any:
        if not isinstance(part, (Tensor, np.ndarray, np.generic, str, bytes, int, float)):
            return INSIDE
        found.append(part)
        return part

    walk(batch, take)
    return found
