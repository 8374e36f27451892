"""What is tried before the first step: each thing that would fail later is refused, or said, now."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_tasks import Small
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from trainer.config.job import Evaluation, Job, Train
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.step import Step
from trainer.reporting.heartbeat import Pulse
from trainer.reporting.rank_report import Report
from trainer.run.folder import RunFolder
from trainer.training.loop import Trainer
from trainer.training.trial import are_equal
from trainer.wiring.rank import RankWiring

Batch = tuple[Tensor, Tensor]


def try_it(folder: Path, task: Small, data: Any = None, seen: Callable[[Trainer], None] = lambda _: None) -> list[str]:
    """What is said of a `task` before its first step, on 101 samples in batches of 14, and 41 in batches of 8."""
    job = Job(
        task="a:B", device="cpu", parallel="single",
        train=Train(batch_size=14, accumulate=2, steps=20, ema_decay=0.9), evaluation=Evaluation(batch_size=8),
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    parallel, run = Parallel(job, RankWiring()), RunFolder(folder)
    model = task.model()
    parallel.wrap(Step(model, task, nullcontext, False))
    report = Report(job, run, 0, parallel, Pulse(0))
    data = task.train_dataset() if data is None else data
    trainer = Trainer(job, task, parallel, report, model, data, task.eval_dataset())
    seen(trainer)
    trainer.try_everything()
    return [event["message"] for event in run.read_events() if event["event"] == "notice"]


class Odd(Small):
    """Its loss is another."""

    def __init__(self, loss: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__(held_out=41)
        self.own = loss

    def loss(self, output: Tensor, batch: Batch) -> Any:
        """What is asked for."""
        losses = functional.cross_entropy(output, batch[1], reduction="none")
        return self.own(losses) if self.own else losses


@pytest.mark.parametrize("loss, problem", [
    (lambda losses: losses.detach(), "has no gradient: it does not depend on the weights"),
    (lambda losses: (losses, -torch.ones_like(losses)), "the count is negative"),
    (lambda losses: losses.squeeze(), "met in a batch of 1, the last of an epoch"),
])  # fmt: skip
def test_losses_are_refused(tmp_path: Path, loss: Any, problem: str) -> None:
    with pytest.raises(JobError, match=problem) as caught:
        try_it(tmp_path, Odd(loss))
    assert caught.value.key == "task.loss"


def test_a_usual_task_is_told_nothing(tmp_path: Path) -> None:
    assert try_it(tmp_path, Odd()) == []


def test_metrics_of_several_values_need_a_summary(tmp_path: Path) -> None:
    """Of a last batch of a single sample too."""
    sizes: list[int] = []

    class Wide(Odd):
        def metrics(self, output: Tensor, batch: Batch) -> Mapping[str, Any]:
            sizes.append(len(output))
            return {"hits": functional.one_hot(output.argmax(1), 10)}

    told = try_it(tmp_path, Wide())
    assert told and set(told) == {told[0]} and "metrics hits have several values per sample" in told[0]
    assert sizes == [4, 1]


def test_a_summary_may_divide_by_what_so_few_samples_lack(tmp_path: Path) -> None:
    class Ratio(Odd):
        def summary(self, sums: Mapping[str, Tensor], count: int) -> Mapping[str, float]:
            return {"ratio": 1 / 0}

    assert try_it(tmp_path, Ratio()) == []


class Drawn(Dataset[Batch]):
    """Draws noise."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Batch:
        return torch.full((1, 8, 8), self.draw()), torch.tensor(index % 10)


def test_samples_that_no_seed_repeats_are_told(tmp_path: Path) -> None:
    told = try_it(tmp_path / "system", Odd(), Drawn(random.SystemRandom().random))
    assert len(told) == 1 and "task.train_dataset: a sample of Drawn is another when it is read again" in told[0]
    assert try_it(tmp_path / "seeded", Odd(), Drawn(random.random)) == []
    assert try_it(tmp_path / "unknown", Odd(), Drawn(lambda: float("nan"))) == []


@pytest.mark.parametrize("one, other, equal", [
    ([torch.tensor([1.0, torch.nan])], [torch.tensor([1.0, torch.nan])], True),
    ([torch.tensor([1.0])], [torch.tensor([2.0])], False), ([torch.ones(2)], [torch.ones(3)], False),
    ([torch.ones(2)], [torch.ones(2, dtype=torch.float64)], False), ({"a": np.ones(2)}, {"a": np.zeros(2)}, False),
    (["a", float("nan")], ["a", float("nan")], True), (["a"], ["b"], False), (["a"], ["a", "a"], False),
])  # fmt: skip
def test_equal_batches(one: Any, other: Any, equal: bool) -> None:
    assert are_equal(one, other) == equal


class Remembers(nn.Module):
    """Its state has something that only pickle can save."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.inner(pixels)
        return output

    def get_extra_state(self) -> Any:
        return {"path": Path("here")}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_a_checkpoint_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    class Unsavable(Odd):
        def model(self) -> nn.Module:
            return Remembers(super().model())

    with pytest.raises(JobError, match=r"_extra_state\.path.* cannot be saved and read again") as caught:
        try_it(tmp_path, Unsavable())
    assert caught.value.key == "task"


class Late(nn.Module):
    """Makes a weight in its forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, None

    def forward(self, pixels: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = nn.Parameter(torch.ones(10))  # type: ignore[assignment]
        output: Tensor = self.inner(pixels) * self.scale
        return output


def test_weights_that_the_forward_pass_makes_are_refused(tmp_path: Path) -> None:
    class Lately(Odd):
        def model(self) -> nn.Module:
            return Late(super().model())

    with pytest.raises(JobError, match=r"task\.model='scale': the forward pass makes these weights"):
        try_it(tmp_path, Lately())


def test_the_averaged_weights_are_evaluated_and_nothing_is_compiled(tmp_path: Path) -> None:
    """And all is as before afterwards."""
    used: list[tuple[bool, nn.Module]] = []
    compiled: list[Any] = []

    class Watched(Odd):
        def output(self, model: nn.Module, batch: Batch) -> Any:
            used.append((torch.is_grad_enabled(), model))
            return model(batch[0])

    def compile_in_vain(function: Callable[..., Any], *arguments: Any) -> Any:
        compiled.append(function)
        return function(*arguments)

    trainers: list[Trainer] = []

    def watch(trainer: Trainer) -> None:
        trainer.parallel.step.apply_model = compile_in_vain
        trainers.append(trainer)

    try_it(tmp_path, Watched(), seen=watch)
    [trainer] = trainers
    average, step = trainer.average, trainer.parallel.step
    assert average is not None and not compiled
    assert used == [(True, step.model), (False, average.module), (False, average.module)]
    assert step.apply_model is compile_in_vain and step.model is trainer.model and average.module.training
