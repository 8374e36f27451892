"""What a task returns: read where that is clear, else refused by name."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.config.job import Job
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.returned import check_values, mean_loss, read_losses, read_metrics, read_summary
from trainer.wiring.rank import RankWiring

CPU = torch.device("cpu")
FOUR = torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("value, expected", [
    (FOUR, FOUR), (FOUR[:, None], FOUR), (FOUR.half(), FOUR), (FOUR.double(), FOUR.double()),
    ((FOUR, torch.tensor([1, 0, 2, 1])), torch.tensor([[1.0, 1], [2, 0], [3, 2], [4, 1]])),
    ((FOUR.sum(), 4), torch.tensor([[10.0, 4]])), ((FOUR, np.int64(4)), torch.tensor([[10.0, 4]])),
])  # fmt: skip
def test_losses(value: Any, expected: Tensor) -> None:
    found = read_losses(value)
    assert torch.equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize("value, problem", [
    (None, "must be a tensor with one value per sample"), (0.5, "must be a tensor"),
    ({"a": FOUR}, "Add several losses up"), ([FOUR, FOUR], "Add several losses up"),
    (FOUR.mean(), "one value per sample"),
    (torch.ones(4, 3), r"reduction=\"none\""), ((FOUR, FOUR.clone().requires_grad_()), "seem to be two losses"),
    ((FOUR, torch.ones(3)), "are not the shapes of a pair"), ((FOUR, torch.ones(4, 3)), "are not the shapes"),
    ((FOUR, None), "is not \\(sum, count\\)"), ((3.0, 4), "is not \\(sum, count\\)"),
])  # fmt: skip
def test_losses_that_cannot_be_told(value: Any, problem: str) -> None:
    with pytest.raises(JobError, match=problem) as caught:
        read_losses(value)
    assert caught.value.key == "task.loss"


def test_metrics() -> None:
    hits = np.array([True, False, True, True])
    found = read_metrics({"a": FOUR, "b": [1, 0, 1, 1], "c": hits, 3: torch.ones(4, 2)}, 4, CPU)
    assert list(found) == ["a", "b", "c", "3"]
    assert torch.equal(found["b"].bool(), torch.from_numpy(hits)) and torch.equal(found["c"], torch.from_numpy(hits))


@pytest.mark.parametrize("values, problem", [
    (None, "must be a dictionary"), ({"a": None}, "is not numbers"), ({"a": ["x"] * 4}, "is not numbers"),
    ({"a": FOUR.mean()}, "a value for each of the 4 samples"), ({"a": 0.5}, "a value for each"),
    ({"a": FOUR[:3]}, "a value for each"), ({"loss": FOUR}, "a name that every line"),
])  # fmt: skip
def test_metrics_that_cannot_be_added_up(values: Any, problem: str) -> None:
    with pytest.raises(JobError, match=problem) as caught:
        read_metrics(values, 4, CPU)
    assert caught.value.key == "task.metrics"


def test_values_of_another_number_of_samples() -> None:
    check_values({"loss": torch.ones(1, 2), "a": FOUR}, 4)
    with pytest.raises(JobError, match="must have one value for each of the 3 samples"):
        check_values({"loss": FOUR}, 3)
    with pytest.raises(JobError, match=r"task.metrics=\{'a'"):
        check_values({"loss": torch.ones(1, 2), "a": FOUR}, 3)


@pytest.mark.parametrize("value, number", [
    (1, 1.0), (True, 1.0), (np.float32(0.5), 0.5), (np.array([2]), 2.0), (np.bool_(True), 1.0), (Fraction(1, 4), 0.25),
    (torch.tensor(3), 3.0), (torch.tensor([0.5]), 0.5), (torch.tensor(0.5, requires_grad=True), 0.5),
])  # fmt: skip
def test_numbers(value: Any, number: float) -> None:
    found = read_summary({"a": value})
    assert found == {"a": number} and type(found["a"]) is float


@pytest.mark.parametrize("value", [None, [0.1, 0.2], np.ones(2), torch.ones(2), "0.5", 1j, {}, object()])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(JobError, match="must be one number") as caught:
        read_summary({"per class": value})
    assert caught.value.key == "task.summary" and "per class" in str(caught.value)


@pytest.mark.parametrize("name", ["step", "attempt", "event", "time", "kind", "loss"])
def test_names_that_are_ours(name: str) -> None:
    with pytest.raises(JobError, match="a name that every line"):
        read_summary({name: 0.5})


def test_the_mean_of_an_evaluation() -> None:
    assert mean_loss(torch.tensor(6.0), 4) == 1.5
    assert mean_loss(torch.tensor([6.0, 12.0]), 4) == 0.5


def test_gradients_of_sums_and_counts_are_those_of_their_quotient() -> None:
    """Over two micro-batches of different counts; and nothing happens where nothing counts."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5).double()
    inputs, counted = torch.randn(6, 3, dtype=torch.float64), torch.rand(6, 5) < 0.5
    total = torch.where(counted, model(inputs).square(), 0).sum() / counted.sum()
    expected = torch.autograd.grad(total, list(model.parameters()))
    parallel = Parallel(Job(device="cpu"), RankWiring())
    parallel.step = nn.ModuleDict({"model": model})  # type: ignore[assignment]
    parallel.step.model = model
    for part in (slice(0, 2), slice(2, 6)):
        losses = torch.where(counted[part], model(inputs[part]).square(), 0)
        pair = losses.sum(1), counted[part].sum(1)
        parallel.backward(read_losses(pair if part.start else (pair[0].sum(), pair[1].sum())), 1 / 6, None)
    loss = parallel.agree(False)
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-14)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-13, atol=1e-15)
        parameter.grad = None
    parallel.backward(read_losses((model(inputs).sum() * 0, 0)), 1 / 6, None)
    assert parallel.agree(False) == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())  # type: ignore[union-attr]
