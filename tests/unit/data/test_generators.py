"""Generators that user code made: found wherever a dataset leads, seeded each in its own way."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from trainer.data.batches import BatchDataset
from trainer.data.generators import find_generators, model_generators, seed_own
from trainer.tasks.digits import Digits

MODULE = np.random.default_rng(3)


def jitter(value: float) -> float:
    """Draws from a generator of this module."""
    return value + MODULE.random()


class Randomizable:
    """As MONAI's: a RandomState that is the class's until it is the instance's."""

    R = np.random.RandomState()

    def __call__(self, value: float) -> float:
        return value + self.R.uniform()


class Compose(nn.Module):
    """As albumentations' and torchvision's: transforms in a list, with two generators."""

    def __init__(self, *transforms: Any) -> None:
        super().__init__()
        self.transforms, self.py_random = transforms, random.Random()
        self.options = {"generator": torch.Generator()}

    def forward(self, value: float) -> float:
        for transform in self.transforms:
            value = transform(value)
        return value + self.py_random.random() + float(torch.rand((), generator=self.options["generator"]))


class Data:
    """Makes a generator when it is first used."""

    def __init__(self) -> None:
        own = np.random.Generator(np.random.SFC64())
        add = lambda value, scale: value + scale * own.normal()  # noqa: E731
        self.transform, self.rng = Compose(Randomizable(), jitter, partial(add, scale=2)), None
        self.large = [random.Random()] * 1000  # samples are not looked at
        self.itself = self

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> float:
        if self.rng is None:
            self.rng = np.random.default_rng()  # type: ignore[assignment]
        return float(self.transform(index) + self.rng.random())  # type: ignore[attr-defined]


def test_they_are_found() -> None:
    kinds = [type(each) for each in find_generators(Data(), "dataset").values()]
    assert sorted(kind.__name__ for kind in kinds) == ["Generator", "Generator", "Generator", "Random", "RandomState"]
    assert set(find_generators(Subset(Data(), [1]), "dataset")) != set()  # type: ignore[arg-type]


class Inherits(Randomizable):
    """Its generator is that of the class before it."""


def with_default(value: float, *, rng: random.Random = random.Random()) -> float:  # noqa: B008
    return value + rng.random()


def test_they_are_found_in_base_classes_and_in_defaults() -> None:
    assert list(find_generators(Inherits(), "root").values()) == [Randomizable.R]
    assert len(find_generators(with_default, "root")) == 1


class Mixes(Digits):
    """Mixes samples by a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng()

    def collate(self, samples: list[Any]) -> Any:
        return [sample * self.rng.random() for sample in samples]


def test_a_batch_is_collated_alike_again() -> None:
    first, again = (BatchDataset([1.0, 2.0], Mixes(), 7)[0, np.array([0, 1])] for _ in range(2))
    assert first == again and first[0] > 0


def test_a_dataset_may_say_that_it_draws_nothing() -> None:
    """Then its samples cost no seeding."""

    class Plain(list[float]):
        deterministic = True

        def __getitem__(self, index: Any) -> Any:
            return random.random()

    random.seed(1)
    expected = [random.random() for _ in range(2)]
    random.seed(1)
    batches = BatchDataset(Plain([1.0]), Digits(), 7)
    assert [batches.sample(0, 0), batches.sample(0, 0)] == expected


def test_those_behind_the_global_functions_are_left_to_others() -> None:
    holder = [random.choice, np.random.rand, np.random.mtrand._rand, torch.default_generator, random.SystemRandom]
    assert find_generators(holder, "holder") == {}


def test_a_sample_is_the_same_again_and_other_samples_are_others() -> None:
    first, again = (BatchDataset(Data(), Digits(), 7) for _ in range(2))
    keys = [(epoch, np.array([index])) for epoch in (0, 1) for index in range(9)]
    values = [float(first[key]) for key in keys]
    assert values == [float(again[key]) for key in reversed(keys)][::-1]
    assert len(set(values)) == 18
    assert float(BatchDataset(Data(), Digits(), 8)[keys[0]]) != values[0]


def test_each_draws_other_numbers() -> None:
    both = {"a": np.random.default_rng(), "b": np.random.default_rng(), "c": np.random.RandomState()}
    seed_own(both, 5)
    first = [both["a"].random(), both["b"].random(), both["c"].rand()]
    seed_own(both, 5)
    assert first == [both["a"].random(), both["b"].random(), both["c"].rand()]
    assert len(set(first)) == 3


def test_those_of_a_model_are_attributes_of_its_modules() -> None:
    model = nn.Sequential(nn.Linear(1, 1), Compose())
    model[1].noise = torch.Generator()
    assert list(model_generators(model)) == ["model.1.py_random", "model.1.noise"]


def test_what_raises_when_it_is_looked_at_is_left_alone() -> None:
    """Such as a proxy outside of its context, or a placeholder for a model that is built later."""

    class Placeholder:
        __slots__ = ()

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"not built yet: {name}")

        @property
        def __class__(self) -> Any:
            raise RuntimeError("not built yet")

    class Task:
        def __init__(self) -> None:
            self.client, self.rng = [Placeholder()], random.Random()

    assert list(find_generators(Task(), "task")) == ["task.rng"]
