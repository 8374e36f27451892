"""Exact means over held-out samples: by one rank here, by several in tests/gloo/test_session_order.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from trainer.config.job import Data, Job
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.training.own_evaluation import evaluate_samples
from trainer.wiring.rank import RankWiring

VALUES = torch.arange(10.0)


def evaluate(
    function: Callable[[Any], Any], beat: Callable[[], None] = lambda: None, step: int = 0
) -> dict[str, float]:
    """In batches of four, of which the last has two."""
    parallel = Parallel(Job(task="a:B"), RankWiring())
    return evaluate_samples(parallel, TensorDataset(VALUES), function, 4, None, Data(), 1, step, beat)


def test_the_mean_is_that_of_samples_and_not_of_batches() -> None:
    beats: list[None] = []
    found = evaluate(lambda batch: {"loss": batch[0] ** 2, "large": batch[0] > 6}, lambda: beats.append(None))
    assert found == {"loss": 28.5, "large": 0.3} and len(beats) == 3, "each batch is a sign of life"


class Rank(Parallel):
    """One of several, which are asked one after the other; the last one hears all."""

    def __init__(self, rank: int, parts: list[Any]) -> None:
        super().__init__(Job(task="a:B"), RankWiring(rank, 3))
        self.parts = parts

    def gather(self, value: Any) -> list[Any]:
        self.parts.append(value)
        return self.parts


def test_sums_are_added_in_the_order_of_the_samples() -> None:
    """Bit by bit as by one rank, whatever that does to the digits."""
    values = torch.tensor([1e16, 3.0, -1e16, 1.0, 7e15, 5.0, -7e15, 1.0, 2.0], dtype=torch.float64)
    parts: list[Any] = []
    ranks = [Parallel(Job(task="a:B"), RankWiring()), *(Rank(rank, parts) for rank in (2, 0, 1))]
    found = [
        evaluate_samples(
            rank, TensorDataset(values), lambda batch: {"value": batch[0]}, 1, None, Data(), 1, 0, lambda: None
        )
        for rank in ranks
    ]
    assert found[0] == found[-1] and found[0]["value"] != float(values.sort().values.sum()) / 9


def test_random_numbers_depend_on_step_and_batch() -> None:
    first, again, later = (
        evaluate(lambda batch: {"noise": torch.rand(len(batch[0]))}, step=step) for step in (3, 3, 4)
    )
    assert first == again != later


@pytest.mark.parametrize("function, problem", [
    (lambda batch: {"mean": batch[0].mean()}, "must have a value for each of the 4 samples"),
    (lambda batch: {"first": batch[0]} if float(batch[0][0]) == 0 else {}, "is missing in some batches"),
    (lambda batch: batch[0], "must be a dictionary"),
    (lambda batch: {"step": batch[0]}, "is a name that every line of metrics.jsonl has"),
])  # fmt: skip
def test_what_is_not_a_value_for_each_sample_is_refused(function: Callable[[Any], Any], problem: str) -> None:
    with pytest.raises(JobError, match=problem) as caught:
        evaluate(function)
    assert caught.value.key == "session.evaluate"
