"""An update without torch's wrappers: the same update, and none where the wrappers are needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trainer.config.job import Train
from trainer.parallel.fast_path import make_step
from trainer.training.optimizer import OPTIMIZERS, make_optimizer


def train_a_bit(train: Train, fast: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, train)
    step = make_step(optimizer) if fast else optimizer.step
    for _ in range(4):
        model(torch.rand(5, 3)).square().mean().backward()
        step()
        assert torch.is_grad_enabled()
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_wrappers_is_the_same_step(name: str) -> None:
    train = Train(optimizer=name, optimizer_args={"momentum": 0.9} if name == "sgd" else {}, weight_decay=0.1)
    (model, optimizer), (expected, reference) = train_a_bit(train, fast=True), train_a_bit(train, fast=False)
    assert make_step(optimizer) != optimizer.step, "this torch wraps its step in another way"
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)
    states = optimizer.state_dict()["state"], reference.state_dict()["state"]
    for index, state in states[1].items():
        assert all(torch.equal(states[0][index][key], value) for key, value in state.items())


def test_a_step_with_hooks_or_of_a_users_optimizer_keeps_its_wrappers() -> None:
    class Own(torch.optim.SGD):
        steps = 0

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            self.steps += 1

    own = Own([nn.Parameter(torch.ones(1))])
    make_step(own)()
    assert own.steps == 1
    seen: list[str] = []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("all"))
    make_step(torch.optim.SGD([nn.Parameter(torch.ones(1))]))()
    handle.remove()
    assert seen == ["all"]
