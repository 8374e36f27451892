"""A schedule of the user's: a function of the step; what is something else is refused before the first step."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR

from trainer.config.job import Train
from trainer.errors import JobError
from trainer.training.schedule import make_schedule


class Counts:
    """Gives another factor each time."""

    calls = 0

    def __call__(self, step: int, steps: int) -> float:
        self.calls += 1
        return 1 / self.calls


def make(monkeypatch: pytest.MonkeyPatch, schedule: Any) -> Any:
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(schedule=schedule))
    return make_schedule(Train(lr=2.0, schedule="own:schedule", warmup_steps=1), 10)


def test_a_function_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = make(monkeypatch, lambda step, steps: torch.tensor(1 - step / steps))
    assert [rate(step) for step in (0, 1, 9)] == pytest.approx([1.0, 1.8, 0.2])


@pytest.mark.parametrize("schedule, problem", [
    (StepLR, "is a torch scheduler"), (lambda step: 1.0, "cannot be asked for step 0 of 10 \\(TypeError"),
    (LambdaLR(torch.optim.SGD([torch.ones(1)], lr=1), lambda step: 1.0), "is a torch scheduler"),
    (lambda step, steps: None, "cannot be asked"), (lambda step, steps: -1.0, "gives -1.0 for step 0"),
    (lambda step, steps: [1.0, 0.5][step], "cannot be asked for step 5 of 10 \\(IndexError"),
    (lambda step, steps: float("nan"), "gives nan"), (lambda step, steps: float("inf"), "gives inf"),
    (Counts(), "gives 1.0 for step 0, then 0.5"),
])  # fmt: skip
def test_what_gives_no_factor(monkeypatch: pytest.MonkeyPatch, schedule: Any, problem: str) -> None:
    with pytest.raises(JobError, match=problem) as caught:
        make(monkeypatch, schedule)
    assert caught.value.key == "train.schedule"
