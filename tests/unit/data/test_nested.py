"""The walk over a batch: every tensor, every kind of nest, and nothing else changed."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.data.device_mover import DeviceMover
from trainer.data.nested import leaves, map_tensors

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


class Holder:
    """An object of the user's, in a circle."""

    def __init__(self) -> None:
        self.image, self.name, self.parent = ONE, "n", self


class Graph:
    """As those of PyTorch Geometric: its tensors are inside of something else."""

    def __init__(self, stores: list[dict[str, Any]]) -> None:
        self.stores = stores

    def __copy__(self) -> Graph:
        return Graph([dict(store) for store in self.stores])

    def to(self, device: Any) -> Graph:
        raise AssertionError("moved by apply")

    def apply(self, function: Any) -> Graph:
        """To each tensor, in place."""
        for store in self.stores:
            store.update({key: function(value) for key, value in store.items() if isinstance(value, Tensor)})
        return self


class Items(Mapping[str, Any]):
    """A mapping with items of its own."""

    def __init__(self, **items: Any) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def test_objects_of_the_users() -> None:
    holder, graph, items = Holder(), Graph([{"x": ONE, "n": "a"}]), Items(a=ONE, b="c")
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    found = map_tensors([holder, graph, items, packed], lambda tensor: tensor + 1)
    assert found[0].image == TWO and found[0].name == "n" and holder.image == ONE
    assert found[1].stores == [{"x": TWO, "n": "a"}] and graph.stores[0]["x"] == ONE
    assert type(found[2]) is Items and dict(found[2]) == {"a": TWO, "b": "c"} and items["a"] == ONE
    assert found[3].data.tolist() == [2, 2, 2] and found[3].batch_sizes.tolist() == [2, 1]


def test_what_has_no_tensors_stays_itself() -> None:
    batch: Any = {"a": ["x"], "b": (1, None)}
    assert map_tensors(batch, lambda tensor: tensor + 1) is batch
    assert leaves([ONE, {"a": np.ones(2), "b": "x"}, Holder(), 3])[2:] == ["x", ONE, "n", 3]
