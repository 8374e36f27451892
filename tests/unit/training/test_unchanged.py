"""What a trial leaves behind: nothing."""

from __future__ import annotations

from logging import Handler
from typing import Any

import torch
from torch import Tensor, nn

from trainer.tasks.digits import Digits
from trainer.training.unchanged import unchanged


class Busy(nn.Module):
    """Changes all that a module has."""

    running: Tensor
    range: Tensor
    late: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(3), nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("late", None)
        self.register_buffer("range", torch.zeros(0))
        self.layer: nn.Module | None = None
        self.calls, self.seen, self.state = 0, [1], torch.zeros(2)

    def forward(self, values: Tensor) -> Tensor:
        """And returns what batch norm makes of it."""
        self.calls += 1
        self.seen.append(2)
        self.state += 1
        self.running = self.running * 0.9 + values.mean(0).detach()
        self.late = torch.ones(1)
        self.register_buffer("new", torch.ones(1))
        self.frozen.data.mul_(2)
        self.layer = nn.Linear(3, 3)  # a module now, where a plain attribute was
        self.range.resize_(3).fill_(1)
        output: Tensor = self.norm(values)
        return output


class Metered(Digits):
    """A task of this module."""


class Meter:
    """Sums up, as a metric of a library does."""

    def __init__(self) -> None:
        self.total, self.values = torch.zeros(1), {"a": 1}

    def update(self) -> None:
        """Once more."""
        self.total += 1
        self.values["b"] = 2


def test_everything_is_put_back() -> None:
    model, task = Busy(), Metered()
    meter = task.meter = Meter()  # type: ignore[attr-defined]
    before: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = dict(vars(model))
    with unchanged(model, task):
        model(torch.randn(4, 3))
        meter.update()
        task.extra = 1  # type: ignore[attr-defined]
        assert model.calls == 1 and meter.total == 1
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert model.calls == 0 and model.seen == [1] and not model.state.any() and model.late is None
    assert not hasattr(model, "new") and not hasattr(task, "extra")
    assert all(vars(model)[name] is value for name, value in attributes.items())
    assert meter.values == {"a": 1} and meter.total == 0
    model(torch.randn(4, 3))


def test_what_a_library_or_a_class_remembers_is_left_alone() -> None:
    """Threads of its own may use it."""
    task: Any = Metered()
    task.handler, task.kind = Handler(), Meter
    with unchanged(Busy(), task):
        task.handler.name = "seen"
        Meter.seen = True  # type: ignore[attr-defined]
    assert task.handler.name == "seen" and Meter.seen  # type: ignore[attr-defined]
    del Meter.seen  # type: ignore[attr-defined]
