"""How a model is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.parallel.step import Step
from trainer.task import Task
from trainer.tasks.digits import Digits


class Scaled(nn.Module):
    """Wants its inputs by name."""

    def forward(self, values: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"scaled": values * scale}


class ByName(Digits):
    """Has the batch as keyword arguments, which `inputs` cannot say."""

    def output(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch)

    def loss(self, output: Any, batch: Any) -> Tensor:
        found: Tensor = output["scaled"]
        return found


class ByPosition(ByName):
    """The same with `inputs`, and a model that takes the dictionary."""

    output = Task.output

    def inputs(self, batch: Any) -> Any:
        return batch["values"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_task_may_call_the_model(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake_compile(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(arguments)
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", fake_compile)
    batch = {"values": torch.ones(3), "scale": torch.tensor(2.0)}
    assert Step(Scaled(), ByName(), None, compiled)(batch).tolist() == [2, 2, 2]
    with pytest.raises(TypeError, match="scale"):
        Step(Scaled(), ByPosition(), None, compiled)(batch)
    assert len(calls) == 2 * compiled
