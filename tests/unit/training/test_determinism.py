"""What torch refuses when deterministic kernels are demanded, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._utils import ExceptionWrapper
from torch.utils.checkpoint import checkpoint

from trainer.errors import JobError
from trainer.training.determinism import DEMANDED, PREFERRED, refusal_named, why_not_demanded

WEIGHT = nn.Parameter(torch.ones(3))


@pytest.fixture(autouse=True)
def preferred() -> Iterator[None]:
    torch.set_deterministic_debug_mode(PREFERRED)
    yield
    torch.set_deterministic_debug_mode(0)


def put() -> Tensor:
    return WEIGHT + torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def put_in_a_replica() -> Tensor:
    """As DataParallel tells of it."""
    try:
        return put()
    except RuntimeError:
        wrapper = ExceptionWrapper(where="in replica 0 on device 0")
        wrapper.reraise()  # type: ignore[no-untyped-call]
        raise


def fail() -> Tensor:
    return WEIGHT @ torch.ones(4)


def exhaust() -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("compute", "compiled", "expected"), [
    (lambda: WEIGHT * 2, False, None),
    (put, False, "put_ does not have a deterministic implementation"),
    (put_in_a_replica, False, "RuntimeError: put_ does not have a deterministic implementation"),
    (lambda: checkpoint(torch.exp, WEIGHT, use_reentrant=True), False, "When use_reentrant=True"),
    (exhaust, True, "there is not the memory"),
])  # fmt: skip
def test_why_they_are_not_demanded(compute: Callable[[], Tensor], compiled: bool, expected: str | None) -> None:
    found = why_not_demanded(compute, [WEIGHT], compiled)
    assert found == expected if expected is None else found is not None and found.startswith(expected)
    assert found is None or ("\n" not in found and "but you set" not in found)
    assert WEIGHT.grad is None
    assert torch.get_deterministic_debug_mode() == PREFERRED


@pytest.mark.parametrize(("compute", "problem"), [(fail, r"size mismatch|inconsistent"), (exhaust, "out of memory")])
def test_other_problems_stay_what_they_are(compute: Callable[[], Tensor], problem: str) -> None:
    with pytest.raises(RuntimeError, match=problem):
        why_not_demanded(compute, [WEIGHT], False)


def test_a_refusal_later_names_the_option() -> None:
    torch.set_deterministic_debug_mode(DEMANDED)
    with pytest.raises(JobError, match=r"train\.deterministic=True: put_ does not"), refusal_named():
        put()
    with pytest.raises(RuntimeError, match=r"size mismatch|inconsistent"), refusal_named():
        fail()
