"""What of a user's module is state: modes, buffers, attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.parallel.module_state import (
    buffers_beside,
    changed_numbers,
    evaluation_mode,
    numbers,
    restore_buffers,
    restore_numbers,
    saved_buffers,
)
from trainer.tasks.digits import Digits
from trainer.training.unchanged import unchanged


class Keeper(nn.Module):
    """Keeps things in its forward pass: in buffers, of which it makes some there, and in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("absent", None)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("grid", torch.eye(2).to_sparse())
        self.count = 0

    def forward(self, values: Tensor) -> Tensor:
        """Shape (batch, 2)."""
        self.count += 1
        self.seen += values.detach().sum(0)
        self.calls += 1
        if self.absent is None:
            self.absent = torch.zeros(3)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(len(values)))
        self.late += 1
        output: Tensor = self.layer(values)
        return output


class Merging(nn.Module):
    """Does more than to change its mode, as adapters that merge their weights for an evaluation."""

    merged = False

    def train(self, mode: bool = True) -> Merging:
        """Merge, or split."""
        self.merged = not mode
        return super().train(mode)


def test_every_part_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout(), nn.Sequential(nn.Dropout()).eval(), Merging())
    before = [part.training for part in model.modules()]
    assert len(set(before)) == 2
    with evaluation_mode(model):
        assert not any(part.training for part in model.modules())
        assert model[3].merged
    assert [part.training for part in model.modules()] == before
    assert not model[3].merged


def test_a_pass_that_shall_change_nothing_leaves_nothing() -> None:
    model: Any = Keeper()
    seen = model.seen
    with unchanged(model, Digits()):
        model(torch.ones(4, 2))
        assert float(seen.sum()) == 8 and model.count == 1 and model.absent is not None
    assert float(seen.sum()) == 0 and model.seen is seen
    assert model.count == 0 and model.absent is None and not hasattr(model, "late")
    assert float(model.calls) == 0
    model(torch.ones(4, 2))
    assert list(model.state_dict()) == ["seen", "absent", "grid", "late", "layer.weight", "layer.bias"]


def test_a_fresh_model_gets_the_buffers_that_a_forward_pass_made() -> None:
    model, fresh = Keeper(), Keeper()
    before = numbers(model)
    for _ in range(3):
        model(torch.ones(5, 2))
    changed = changed_numbers(model, before)
    assert changed == {"": {"count": 3}}
    fresh(torch.ones(1, 2))  # a buffer of another size
    for other in (Keeper(), fresh):
        restore_buffers(other, model.state_dict(), buffers_beside(model))
        other.load_state_dict(model.state_dict())
        assert float(other.calls) == 3
        assert float(other.late.sum()) == 15
        assert list(other.state_dict()) == list(model.state_dict())
        restore_numbers(other, changed)
        assert other.count == 3
        other(torch.ones(5, 2))
    assert float(model.late.sum()) == 15, "it shares memory with a model that was restored from it"


def test_a_model_that_is_another_now_takes_what_it_can() -> None:
    """Of parts that are gone, the error of `load_state_dict` tells; what never was saved may have another size."""
    model: Any = nn.Sequential(nn.BatchNorm1d(2), Keeper())
    changed: Any = nn.Sequential(nn.BatchNorm1d(2), Keeper())
    state, beside = model.state_dict(), buffers_beside(model)
    model[1].calls += 1
    changed[1].register_buffer("calls", torch.zeros(3), persistent=False)
    restore_buffers(changed, state, beside)
    assert changed[1].calls.tolist() == [0, 0, 0]
    restore_buffers(nn.Sequential(), state, beside)


def test_a_mode_is_no_number() -> None:
    model = Keeper()
    before = numbers(model)
    assert changed_numbers(model.eval(), before) == {}


def test_a_shared_buffer_has_all_its_names() -> None:
    norm = nn.BatchNorm1d(2)
    assert {"0.running_mean", "1.running_mean"} <= set(saved_buffers(nn.Sequential(norm, norm)))
