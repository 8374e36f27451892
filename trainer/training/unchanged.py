"""Computing something that shall not count: what modules and task remember of it is put back."""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from trainer.data.nested import attributes_of
from trainer.parallel.module_state import is_dense
from trainer.task import Task

COLLECTIONS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
SMALL, FROZEN = 2**20, 2**26
"""Elements of an attribute, and of all frozen parameters together, up to which they are copied: larger is data."""
OTHERS = (type, FunctionType, MethodType, ModuleType, Tensor, Dataset)


@contextmanager
def unchanged(model: nn.Module, task: Task) -> Iterator[None]:
    """Put back afterwards what a forward pass or the task's methods changed.

    That is buffers, frozen parameters, and the attributes of each module, of the task and of objects of its own package
    that it holds, with what collections among them hold. Weights change with the optimizer alone. What lies deeper is
    not put back.
    """
    inner = [value for value in vars(task).values() if attributes_of(value) and not isinstance(value, OTHERS)]
    own = {_package(kind) for kind in type(task).__mro__}  # a logger of a library may have threads of its own
    inner = [value for value in inner if isinstance(value, nn.Module) or _package(type(value)) in own]
    parts = [part for root in (model, *inner) for part in (root.modules() if isinstance(root, nn.Module) else [root])]
    attributes = [(vars(part), dict(vars(part))) for part in (*parts, task)]
    values = {id(value): value for _, kept in attributes for value in kept.values()}
    collections = [(value, copy.copy(value)) for value in values.values() if type(value) in COLLECTIONS]
    small = (value for value in values.values() if type(value) is Tensor and value.numel() <= SMALL)
    frozen = [value for value in model.parameters() if not value.requires_grad]
    fit = frozen if sum(value.numel() for value in frozen) <= FROZEN else []
    tensors = {id(value): value for value in (*model.buffers(), *small, *fit) if is_dense(value) and value.is_leaf}
    before = [value.clone() for value in tensors.values()]
    try:
        yield
    finally:
        for live, kept in attributes:
            for name in live.keys() - kept.keys():
                del live[name]
            live.update({name: value for name, value in kept.items() if live.get(name, live) is not value})
        for collection, kept in collections:
            put_back(collection, kept)
        with torch.no_grad():
            for tensor, value in zip(tensors.values(), before, strict=True):
                if tensor.shape != value.shape:  # as observers of quantization do
                    tensor.resize_(value.shape)
                tensor.copy_(value)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def put_back(collection: Any, kept: Any) -> None:
    """Give a collection the contents of its copy."""
    collection.clear()
    if isinstance(collection, (list, deque)):
        collection.extend(kept)
    else:
        collection.update(kept)
