"""The walk over a batch: every tensor, every kind of nest, and nothing else changed."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trainer.data.device_mover import DeviceMover
from trainer.data.nested import map_tensors

ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Example:
    image: Any
    name: str
    kept: int = field(default=7, init=False)


@pytest.mark.parametrize("batch, expected", [
    (ONE, TWO),
    ([ONE, "x", [ONE]], [TWO, "x", [TWO]]),
    ((ONE, 3), (TWO, 3)),
    (Pair(ONE, None), Pair(TWO, None)),
    ({"a": ONE, "b": {"c": (ONE,)}}, {"a": TWO, "b": {"c": (TWO,)}}),
    (OrderedDict(a=ONE), OrderedDict(a=TWO)),
    (UserDict(a=ONE), UserDict(a=TWO)),
    (MappingProxyType({"a": ONE}), {"a": TWO}),
    (Example((ONE, "y"), "n"), Example((TWO, "y"), "n")),
    (Example, Example), ("text", "text"), ([], []), ({}, {}), (None, None),
])  # fmt: skip
def test_each_tensor_is_replaced_in_its_place(batch: Any, expected: Any) -> None:
    found = map_tensors(batch, lambda tensor: tensor + 1)
    assert type(found) is type(expected) and found == expected
    assert ONE == 1


def test_only_floating_tensors_get_another_type() -> None:
    mover = DeviceMover(torch.device("cpu"), torch.float64, True, 1)
    batch = {"images": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2, dtype=torch.int64), "names": ["a", "b"]}
    [moved] = mover.move(iter([batch]))
    images: Tensor = moved["images"]
    assert images.dtype == torch.float64 and images.is_contiguous(memory_format=torch.channels_last)
    assert moved["labels"].dtype == torch.int64 and moved["names"] == ["a", "b"]
