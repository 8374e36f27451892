"""Learning rates and parameter groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trainer.config.job import Train
from trainer.errors import JobError
from trainer.training.optimizer import Rates, make_optimizer, make_scaler
from trainer.training.schedule import make_schedule


@pytest.mark.parametrize("schedule, expected", [
    ("constant", [1, 1, 1, 1, 1]),
    ("linear", [1, 0.8, 0.6, 0.4, 0.2]),
    ("cosine", [0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]),
])  # fmt: skip
def test_schedules(schedule: str, expected: list[float]) -> None:
    rate = make_schedule(Train(lr=2.0, schedule=schedule), 5)
    assert [rate(step) for step in range(5)] == pytest.approx([2 * share for share in expected])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_reaches_the_peak_and_the_floor_is_kept(schedule: str) -> None:
    rate = make_schedule(Train(lr=1.0, schedule=schedule, warmup_steps=4, min_lr_ratio=0.1), 20)
    rates = [rate(step) for step in range(25)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0 == max(rates)
    assert min(rates[4:]) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert rates[20:] == rates[20:21] * 5


def test_warm_up_as_long_as_the_run() -> None:
    rate = make_schedule(Train(lr=1.0, warmup_steps=3), 3)
    assert [rate(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_vectors_are_not_decayed_and_frozen_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].weight.requires_grad_(False)
    optimizer = make_optimizer(model, Train(weight_decay=0.5))
    decayed, others = optimizer.param_groups
    assert [tuple(weight.shape) for weight in decayed["params"]] == [(3, 3)]
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0
    assert [tuple(weight.shape) for weight in others["params"]] == [(3,), (3,), (3,), (2,)]


def test_a_group_scales_its_rate() -> None:
    weight = nn.Parameter(torch.ones(1))
    others = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [weight], "lr_scale": 0.1}, {"params": others[:1], "lr": 0.02}, {"params": others[1:]}]
    optimizer = torch.optim.SGD(groups, lr=1)
    assert Rates(optimizer, 1.0).set(3.0) == pytest.approx(0.3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.06, 3.0])
    optimizer.param_groups[2]["lr"] = None  # it chooses its own, as Adafactor does
    assert Rates(optimizer, 1.0).set(3.0) == pytest.approx(0.3)
    assert optimizer.param_groups[2]["lr"] is None


@pytest.mark.parametrize("train, key, problem", [
    (Train(optimizer_args={"momentum": 0.9}), "train.optimizer_args", "momentum"),
    (Train(optimizer="sgd", optimizer_args={"momentum": -1}), "train.optimizer_args", "momentum"),
    (Train(optimizer="torch.optim:Nothing"), "train.optimizer", "has no Nothing"),
    (Train(optimizer="nowhere:Nothing"), "train.optimizer", "no module nowhere"),
    (Train(optimizer="torch.optim:LBFGS"), "train.optimizer", "closure"),
    (Train(optimizer="unittest.mock:Mock"), "train.optimizer", "did not return a torch.optim.Optimizer"),
])  # fmt: skip
def test_what_cannot_be_built_is_named(train: Train, key: str, problem: str) -> None:
    with pytest.raises(JobError, match=problem) as caught:
        make_optimizer(nn.Linear(2, 2), train)
    assert caught.value.key.startswith(key)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(JobError, match="no parameter to train"):
        make_optimizer(nn.ReLU(), Train())


def test_complex_weights_and_sparse_gradients_take_the_plain_kernels() -> None:
    model = nn.ParameterDict({"phase": nn.Parameter(torch.ones(2, dtype=torch.complex64))})
    optimizer = make_optimizer(model, Train(lr=0.5))
    model["phase"].abs().sum().backward()
    optimizer.step()
    assert model["phase"].abs().max() < 1
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = make_optimizer(table, Train(optimizer="sgd", lr=0.5, optimizer_args={"momentum": 0.9}))
    before = table.weight.detach().clone()
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert (before != table.weight).any(1).tolist() == [False, True, False, False, False]


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(JobError, match="needs a GPU"):
        make_scaler("fp16", torch.device("cpu"))
