"""Batches are nested as user code likes: one walk over them for whatever is to be done with their tensors."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same batch with `function` applied to each tensor.

    Mappings, tuples with and without names, lists and dataclasses keep their types; what else there is stays as it is.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        values = {key: map_tensors(value, function) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return values
        kept = copy.copy(batch)  # a subclass may have more to it than its items
        kept.update(values)
        return kept
    if isinstance(batch, (tuple, list)):
        items = [map_tensors(value, function) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch) if field.init]
        return dataclasses.replace(batch, **{name: map_tensors(getattr(batch, name), function) for name in fields})
    return batch
