"""The backward pass without torch's Python around it: the same gradients, the same refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.parallel import fast_path
from trainer.parallel.fast_path import run_backward


def gradients(run: Any) -> list[Tensor]:
    """Of a small network and a leaf, after a backward pass from both."""
    torch.manual_seed(0)
    model, vote = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), nn.Parameter(torch.zeros(2))
    losses = model(torch.randn(5, 3)).squeeze(1)
    run((losses, vote), (torch.full((5,), 0.2), torch.tensor([0.3, 1.0])))
    return [parameter.grad for parameter in (*model.parameters(), vote)]  # type: ignore[misc]


def test_gradients_are_those_of_torchs_function(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(torch.autograd.backward)
    assert fast_path.run_engine is not None, "this torch has no such function: backward passes are slower"
    for run_engine in (fast_path.run_engine, None):
        monkeypatch.setattr(fast_path, "run_engine", run_engine)
        for found, wanted in zip(gradients(run_backward), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_gradient_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        run_backward((torch.ones(3, requires_grad=True) * 2,), (torch.ones(4),))


def test_a_subclass_goes_its_own_way() -> None:
    seen = []

    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    losses = (torch.ones(3, requires_grad=True) * 2).as_subclass(Own)
    run_backward((losses,), (torch.ones(3),))
    assert torch.autograd.backward in seen
