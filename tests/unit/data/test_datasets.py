"""What a dataset may be, and what is said of what it may not be."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from trainer.config.job import Data
from trainer.data.batches import BatchDataset
from trainer.data.datasets import count_samples, find_sample
from trainer.data.loader import Loader
from trainer.errors import JobError
from trainer.tasks.digits import Digits


class Stream(IterableDataset[Any]):
    """Samples one after another, of a known number."""

    def __iter__(self) -> Iterator[Any]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


class Unsized(Dataset[Any]):
    """Nobody knows how many."""

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("dataset", [[1, 2, 3], np.ones(3), torch.ones(3, 2), TensorDataset(torch.ones(3))])
def test_what_has_a_length_and_an_index(dataset: Any) -> None:
    assert count_samples("task.train_dataset", dataset) == 3


@pytest.mark.parametrize("dataset, problem", [
    (Stream(), "Stream.*cannot be indexed"), (iter([1, 2]), "cannot be indexed"),
    ((each for each in [1]), "script"), (None, "cannot be indexed"), (Unsized(), "has no length"),
    (DataLoader(TensorDataset(torch.ones(3))), "is a loader.*Return its dataset"),
    ({"train": [1], "test": [2]}, "Return one of its values: train, test"), ([], "is empty"),
])  # fmt: skip
def test_what_is_refused(dataset: Any, problem: str) -> None:
    with pytest.raises(JobError, match=problem) as caught:
        count_samples("task.train_dataset", dataset)
    assert caught.value.key == "task.train_dataset"


class Sampled(list[int]):
    """Has a method that is called instead of [index]."""

    def sample(self, index: int, rng: np.random.Generator) -> int:
        return 100 + index


class OnlySampled:
    """Its samples are asked for by the method alone."""

    def __len__(self) -> int:
        return 3

    def sample(self, index: int, rng: np.random.Generator) -> int:
        return index


def test_a_method_sample_is_enough() -> None:
    assert count_samples("task.train_dataset", OnlySampled()) == 3


class Wrapper:
    """Passes attributes through, as many do."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Named(list[int]):
    """Has something else of that name."""

    sample = 0.5


class Drawn(list[int]):
    """Draws some."""

    def sample(self, count: int = 3) -> list[int]:
        return self[:count]


def test_the_method_sample_is_found() -> None:
    rng = np.random.default_rng()
    found = find_sample(Subset(Subset(Sampled(range(9)), [5, 6, 7]), [2, 1]))  # type: ignore[arg-type]
    assert found is not None and [found(0, rng), found(1, rng)] == [107, 106]
    for other in (Named([1]), Drawn([1]), Wrapper(Sampled([1])), [1], Subset(Drawn([1]), [0])):  # type: ignore[arg-type]
        assert find_sample(other) is None
    assert BatchDataset(Named([7, 8]), Digits(), 0).sample(0, 1) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_none_is_named(workers: int) -> None:
    loader = Loader([0, 1, None, 3], Digits(), Data(workers=workers), 0, False, "task.train_dataset")  # type: ignore[arg-type]
    try:
        with pytest.raises(JobError, match=r"task.train_dataset=None: sample 2 is None"):
            list(loader.read([(0, np.array([1, 3])), (0, np.array([1, 2]))]))
    finally:
        loader.close()


@pytest.mark.parametrize("samples, problem", [
    ([torch.ones(2), torch.ones(3)], "equal size"), ([object(), object()], "must contain tensors"),
    ([{"a": 1}, {"b": 1}], "samples \\[0, 1\\] cannot be combined into a batch"),
])  # fmt: skip
def test_samples_that_do_not_make_a_batch(samples: Any, problem: str) -> None:
    found = BatchDataset(samples, Digits(), 0)[0, np.array([0, 1])]
    with pytest.raises(JobError, match=problem):
        raise found


def test_an_error_travels_from_a_worker_as_it_is() -> None:
    error = JobError("task.loss", object(), "is wrong", "Correct it")
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), copied.key) == (JobError, str(error), "task.loss")
    assert str(pickle.loads(pickle.dumps(copied))) == str(error)
