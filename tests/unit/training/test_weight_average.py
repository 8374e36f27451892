"""The moving average: torch's own for what torch knows, and right for the models that it does not."""

from __future__ import annotations

import copy
import threading
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.errors import JobError
from trainer.training.weight_average import WeightAverage


def test_the_average_is_torchs_and_its_buffers_are_the_newest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, reference = WeightAverage(model, 0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(5):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        model(torch.randn(6, 3))
        average.update_parameters(model)
        reference.update_parameters(model)
    for name, value in average.module.state_dict().items():
        assert torch.equal(value, reference.module.state_dict()[name]), name
    assert average.n_averaged == reference.n_averaged
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)  # type: ignore[index, arg-type]
    assert not torch.equal(average.module[0].weight, model[0].weight)  # type: ignore[index, arg-type]


def old_weight_norm(layer: nn.Module) -> nn.Module:
    """The one that keeps what autograd computed as an attribute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


@pytest.mark.parametrize("normalise", [
    old_weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm,
    parametrizations.orthogonal,
])  # fmt: skip
def test_normalised_weights_are_averaged(normalise: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(normalise(nn.Linear(3, 3)))
    model(torch.ones(2, 3))
    average = WeightAverage(model, 0.5)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        model(torch.ones(2, 3))
        average.update_parameters(model)
    expected = copy.deepcopy(average.module.state_dict())
    output = average.module.eval()(torch.ones(2, 3))
    again = nn.Sequential(normalise(nn.Linear(3, 3)))
    again.load_state_dict(expected)
    torch.testing.assert_close(output, again.eval()(torch.ones(2, 3)))


class Odd(nn.Module):
    """A sparse buffer, large frozen whole numbers, complex weights, and a buffer that a forward pass makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.eye(2).to_sparse())
        self.register_buffer("rows", torch.eye(2).to_sparse_csr())
        self.codes = nn.Parameter(2**24 + torch.arange(3), requires_grad=False)
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.flag = nn.Parameter(torch.ones(1))

    def forward(self, values: Tensor) -> Tensor:
        """As many values."""
        self.register_buffer("late", torch.full((len(values),), float(values.sum())))
        return values * self.phase.abs()


def test_odd_models_are_averaged() -> None:
    model, average = Odd(), WeightAverage(Odd(), 0.5)
    for step in (1, 2):
        model.phase.data *= 3
        model(torch.full((step, 2), float(step)))
        average.update_parameters(model)
    module: Any = average.module
    assert module.phase.tolist() == [6 + 0j] * 2  # the mean of 3 and 9
    assert module.codes.tolist() == [2**24, 2**24 + 1, 2**24 + 2]
    assert module.late.tolist() == [8.0, 8.0]
    assert list(module.state_dict()) == list(model.state_dict())


def test_a_copy_that_would_compute_with_the_models_own_weights_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, usual = model[0], model[0].forward
    for forward in (lambda values: 2 * first.weight.sum() * values, lambda values: 2 * usual(values)):
        first.forward = forward  # type: ignore[method-assign]
        with pytest.raises(JobError, match=r"the forward of 0 is a function that holds the model"):
            WeightAverage(model, 0.9)
    first.forward = partial(usual)  # type: ignore[method-assign]
    WeightAverage(model, 0.9)  # a method is copied with its module


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(JobError, match=r"train\.ema_decay=0\.9: the model cannot be copied"):
        WeightAverage(model, 0.9)
