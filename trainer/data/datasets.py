"""What a dataset may be, how a sample of it is asked for, and what is refused before a sample is read."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, Subset

from trainer.errors import JobError

Sample = Callable[[int, np.random.Generator], Any]


def count_samples(key: str, dataset: Any) -> int:
    """How many samples a dataset has. Raises JobError: none, or samples cannot be asked for by their number."""
    kind, problem = type(dataset).__name__, ""
    remedy = "Give it __len__ and __getitem__, as a list has, or train with a script"
    if isinstance(dataset, Mapping):
        problem, remedy = "is a mapping, not samples", f"Return one of its values: {', '.join(map(str, dataset))}"
    elif isinstance(dataset, DataLoader):
        problem, remedy = "is a loader", "Return its dataset; set train.batch_size and data.workers in the job"
    elif isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") or find_sample(dataset)):
        problem = "cannot be indexed, so Muster could not control the order of its samples"
    else:
        try:
            count = len(dataset)
        except (TypeError, NotImplementedError) as error:
            problem = f"has no length ({error})"
    if problem:
        raise JobError(key, kind, problem, remedy)
    if not count:
        raise JobError(key, count, "is empty", "Give it at least one sample")
    return count


def find_sample(dataset: Any) -> Sample | None:
    """The method `sample(index, rng)` of a dataset, through subsets of it; other attributes of that name are not it."""
    if isinstance(dataset, Subset):
        inner, indices = find_sample(dataset.dataset), dataset.indices
        return None if inner is None else lambda index, rng: inner(indices[index], rng)
    if inspect.getattr_static(dataset, "sample", None) is None:  # and no wrapper that passes attributes through
        return None
    found = dataset.sample
    try:
        parameters = inspect.signature(found).parameters.values() if callable(found) else ()
    except (TypeError, ValueError):
        return None
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in parameters if each.kind in places and each.default is each.empty]
    return found if len(needed) == 2 else None
