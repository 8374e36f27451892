"""DataParallel on CPUs: batches are cut and outputs joined as torch's own does on GPUs."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trainer.errors import JobError
from trainer.parallel.modes import ThreadReplicas, replicate, scatter
from trainer.parallel.step import apply_model, compile_call


class Pair(NamedTuple):
    """A batch with fields."""

    left: Tensor
    right: Tensor


@pytest.mark.parametrize("batch, parts, sizes", [
    (torch.arange(10), 3, [4, 4, 2]), (torch.arange(2), 3, [1, 1]), (torch.arange(9), 1, [9]),
])  # fmt: skip
def test_tensors_are_cut_into_chunks(batch: Tensor, parts: int, sizes: list[int]) -> None:
    pieces = scatter(batch, parts)
    assert [len(piece) for piece in pieces] == sizes
    assert torch.equal(torch.cat(pieces), batch)


def test_batches_keep_their_type_and_what_is_no_tensor() -> None:
    column = torch.arange(6)
    batches = Pair(column, column), (column, "text", 3, None), [column, [column, {"a": column}]], {"x": column}, column
    for batch in batches:
        first, second = scatter(batch, 2)
        assert type(first) is type(second) is type(batch)
        assert _columns(first) == [[0, 1, 2]] * len(_columns(batch))
        assert _columns(second) == [[3, 4, 5]] * len(_columns(batch))
    assert scatter((column, "text", 3, None), 2)[1][1:] == ("text", 3, None)


def test_texts_and_lists_are_cut_with_the_samples() -> None:
    images, names = torch.arange(4), ["a", "b", "c", "d"]
    sizes = [torch.ones(3, size, size) for size in (1, 2, 3, 4)]  # of detection: a list of images
    targets = tuple({"boxes": torch.ones(number, 4), "name": name} for number, name in enumerate(names))
    batch = {"image": images, "name": names, "sizes": sizes, "targets": targets, "weights": torch.ones(7), "n": 4}
    first, second = scatter(batch, 2, 4)
    assert second["image"].tolist() == [2, 3] and second["name"] == ["c", "d"]
    assert [len(part["sizes"]) for part in (first, second)] == [2, 2] and second["sizes"][0] is sizes[2]
    assert second["targets"] == targets[2:] and first["n"] == 4 and len(first["weights"]) == 7
    pair = [torch.arange(2), ["a", "b"]]
    assert [part[1] for part in scatter(pair, 2, 2)] == [["a"], ["b"]]


def test_what_cannot_be_cut_is_refused() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    even = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(2)])  # as many steps as there are samples
    for batch in (packed, even, {"x": torch.ones(3)}, [["a", "b"]]):
        with pytest.raises(JobError, match="parallel='dp'"):
            scatter(batch, 2, 4)


def _columns(batch: Any) -> list[list[int]]:
    if isinstance(batch, Tensor):
        return [batch.tolist()]
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else []
    return [column for value in values for column in _columns(value)]


class Awkward(nn.Module):
    """Tied layers, an absent bias, a list of parameters, a buffer, a layer that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.again = self.first
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))])
        self.register_buffer("offset", torch.full((4,), 2.0))
        self.register_buffer("absent", None)
        self.nothing = None
        self.register_module("empty", None)

    def forward(self, values: Tensor, evaluate: bool = False) -> Tensor:
        """Shape (batch,)."""
        hidden = self.first(values) * self.scales[0] + self.offset
        output: Tensor = (self.again(hidden) * self.scales[1]).sum(1)
        return output.round() if evaluate else output


def test_replicas_compute_the_same_and_gradients_add_up() -> None:
    torch.manual_seed(0)
    values = torch.randn(7, 4, dtype=torch.float64)
    model = Awkward().double()
    model(values).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    for replicas in (1, 2, 3, 7, 9):
        model.zero_grad()
        output = ThreadReplicas(model, replicas)(values)
        torch.testing.assert_close(output, model(values), rtol=1e-13, atol=0)
        output.sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-13)


def test_a_replica_has_buffers_of_its_own_and_shares_the_rest() -> None:
    original: Any = Awkward()
    original.data = [object()]
    copy: Any = replicate(original)
    assert copy.first is copy.again is not original.first
    assert copy.first.bias is None
    assert copy.first.weight is original.first.weight
    assert copy.data is original.data
    copy.offset += 1
    assert torch.equal(original.offset, torch.full((4,), 2.0))


def test_evaluation_reaches_the_replicas_without_gradients() -> None:
    with torch.no_grad():
        output = ThreadReplicas(Awkward(), 2)(torch.ones(4, 4), True)
    assert not output.requires_grad
    assert torch.equal(output, output.round())


def test_an_error_in_a_replica_is_the_users_to_see() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ThreadReplicas(Awkward(), 2)(torch.ones(4, 3))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model: Any = Awkward()
    model.tools = {"lock": threading.Lock()}
    with pytest.raises(JobError, match="parallel='dp': the model cannot be copied for each device"):
        ThreadReplicas(model, 2)(torch.ones(4, 4))


@pytest.mark.parametrize("replicas", [3, 4])
def test_gradients_of_replicas_are_added_in_one_order(replicas: int) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(13, 6)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Tensor, evaluate: bool = False) -> Tensor:
            return self.model(batch).squeeze(1)  # type: ignore[no-any-return]

    threads = ThreadReplicas(First(), replicas)
    seen = set()
    for _ in range(150):
        model.zero_grad()
        threads(batch).sum().backward()
        seen.add(b"".join(parameter.grad.numpy().tobytes() for parameter in model.parameters()))  # type: ignore[union-attr]
    assert len(seen) == 1


def test_a_compiler_that_fails_is_the_jobs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failure(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(model: nn.Module, inputs: Any) -> Any:
        raise Failure("CppCompileError: C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\nfatal error: no Python.h")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(JobError, match=r"train\.compile=True: .* C\+\+ compile error; fatal error: no Python\.h\."):
        compile_call(apply_model)(nn.Identity(), None)
