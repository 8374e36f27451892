"""Where models are cut, and what each rank keeps of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from trainer.errors import JobError
from trainer.parallel.stages import balance, cut_model, keep_stage
from trainer.tasks.digits import Digits


class Cut(Digits):
    """Cut where its argument says."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self.parts = parts

    def stages(self, model: nn.Module) -> Iterable[nn.Module]:
        return self.parts


class Called(Digits):
    """Calls its model with names."""

    def output(self, model: nn.Module, batch: Any) -> Any:
        return model(input=batch)


@pytest.mark.parametrize("sizes, count, sums", [
    ((1, 1, 1, 1), 2, [2, 2]), ((5, 1, 1, 1), 2, [5, 3]), ((0, 4, 0, 0, 3, 0), 2, [4, 3]),
    ((1, 2, 3, 4, 5), 3, [6, 4, 5]), ((0, 0, 9), 3, [0, 0, 9]),
])  # fmt: skip
def test_the_largest_stage_is_as_small_as_it_can_be(sizes: tuple[int, ...], count: int, sums: list[int]) -> None:
    ends = balance(sizes, count)
    assert ends[-1] == len(sizes) and len(ends) == count
    assert [sum(sizes[start:end]) for start, end in pairwise([0, *ends])] == sums


def test_a_rank_keeps_the_values_of_its_stage_and_the_names_of_all() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), nn.Linear(4, 4), shared)
    model.register_buffer("unused", torch.zeros(1))
    names, parts = list(model.state_dict()), [shared, model[2], shared]
    found = cut_model(Cut(parts), model, 3)
    assert found.stages == [[shared], [model[2]], [shared]]
    assert {users: list(map(id, weights)) for users, weights in found.shared.items()} == {
        (0, 2): [id(shared.weight), id(shared.bias)]
    }
    keep_stage(model, found.stages[0])
    assert list(model.state_dict()) == names
    assert {name for name, value in model.state_dict().items() if value.is_meta} == {"2.weight", "2.bias", "unused"}
    assert model[0].weight is model[3].weight is shared.weight and not shared.weight.is_meta


@pytest.mark.parametrize("task, model, words", [
    (Called(), nn.Sequential(nn.Linear(1, 1)), "task.output='Called'"),
    (Digits(), nn.Linear(1, 1), "Linear is not a torch.nn.Sequential"),
    (Cut([print, print]), nn.Linear(1, 1), "must be torch.nn.Modules"),
    (Digits(), nn.Sequential(nn.Linear(1, 1)), "more than the 1 modules"),
    (Cut([nn.Tanh(), nn.Tanh()]), nn.Linear(1, 1), "weight, bias are in none of them"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_name(task: Digits, model: nn.Module, words: str) -> None:
    with pytest.raises(JobError) as caught:
        cut_model(task, model, 2)
    assert words in str(caught.value)
