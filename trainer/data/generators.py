"""Generators that user code made for itself: found where a dataset or a task leads to them, and seeded with the rest.

The global generators are seeded in `trainer.data.rng`. Those of a transform (`self.R` of MONAI, `random_generator` of
albumentations, a `random.Random`, a `torch.Generator`) are as random, and would start anew in each process.
"""

import random
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data.nested import read_attributes

KINDS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
OPAQUE = (str, bytes, bool, int, float, complex, type(None), Tensor, np.ndarray, np.generic, ModuleType)
LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "muster", "trainer"}
"""Packages whose classes and functions hold no generators but the global ones."""
FAR, LARGE = 20_000, 256
"""Objects to look at, some 20 ms; a collection that is larger holds samples, not transforms."""
ODD = 0x9E3779B97F4A7C15
"""Times this, neighbours have nothing in common (Knuth's multiplicative hash)."""

Generators = dict[str, Any]
"""By the path that leads there, which is the same in each process."""


def find_generators(root: Any, name: str) -> Generators:
    """All generators that `root` leads to through attributes, collections, functions and their global names."""
    known = {id(each) for each in _global_generators()}
    found: Generators = {}
    waiting = deque([(name, root)])
    kept: list[Any] = []  # or an id could be given again
    while waiting and len(kept) < FAR:
        path, item = waiting.popleft()
        with suppress(Exception):  # placeholders raise whatever is asked of them, even their class
            if isinstance(item, OPAQUE) or id(item) in known:
                continue
            known.add(id(item))
            kept.append(item)
            if isinstance(item, KINDS):
                found[path] = item
            else:
                waiting.extend([(f"{path}{step}", value) for step, value in _parts(item)])
    return found


def model_generators(model: nn.Module) -> Generators:
    """Those that are attributes of a model's modules."""
    return {
        f"model.{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items() if isinstance(value, KINDS)
    }  # fmt: skip


def seed_own(generators: Generators, value: int) -> None:
    """Seed each in a way of its own; 1 to 20 microseconds for each."""
    for path, generator in generators.items():
        seed = (value + zlib.crc32(path.encode()) * ODD) % 2**64
        if isinstance(generator, np.random.Generator):
            kind: Any = type(generator.bit_generator)
            generator.bit_generator.state = kind(seed).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed([seed % 2**32, seed >> 32])
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        else:
            generator.seed(seed)


def _global_generators() -> tuple[Any, ...]:
    """Those behind the functions of modules."""
    python: Any = random.seed
    numpy: Any = np.random.rand
    return python.__self__, numpy.__self__, torch.default_generator


def _parts(item: Any) -> Iterator[tuple[str, Any]]:
    """What an object leads to, each with the step of the path to it."""
    if isinstance(item, (dict, list, tuple, set, frozenset, deque)):
        if len(item) <= LARGE:
            pairs = item.items() if isinstance(item, dict) else enumerate(item)
            yield from ((f"[{key!r}]", value) for key, value in pairs)
    elif isinstance(item, FunctionType):
        yield from _parts_of_function(item)
    elif isinstance(item, type):
        if not _is_of_library(item):
            yield from ((f".{name}", value) for name, value in vars(item).items())
    elif isinstance(item, (MethodType, partial, property, staticmethod, classmethod)):
        names = ("__self__", "__func__", "func", "args", "keywords", "fget")
        yield from ((f".{name}", getattr(item, name)) for name in names if hasattr(item, name))
    else:
        yield from ((f".{name}", value) for name, value in read_attributes(item).items())
        yield from ((f".{kind.__qualname__}", kind) for kind in type(item).__mro__)


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for cell, name in zip(function.__closure__ or (), function.__code__.co_freevars, strict=True):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield "()", function.__defaults__
    yield "()", function.__kwdefaults__
    if not _is_of_library(function):
        names = (name for name in function.__code__.co_names if name in function.__globals__)
        yield from ((f".{name}", function.__globals__[name]) for name in names)


def _is_of_library(item: Any) -> bool:
    return str(getattr(item, "__module__", "")).partition(".")[0] in LIBRARIES
