"""`train.deterministic`: on GPUs the same bits from run to run, as far as torch has kernels for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import JobError

MISSING = "does not have a deterministic implementation"
"""What torch says of an operation when told to use no other."""


def prefer_deterministic() -> None:
    """Let kernels be deterministic where torch takes such by itself, and warn of the others."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS differs from run to run
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill: Any = torch.utils.deterministic
    fill.fill_uninitialized_memory = False  # a kernel more for each new tensor


def demand_deterministic(
    compute: Callable[[], Tensor], parameters: Iterable[nn.Parameter], compiled: bool
) -> str | None:  # fmt: skip
    """Let all kernels be deterministic if a step can be computed with such alone; else return why it cannot.

    While torch only warns it also takes kernels that are not where it has some that are: in attention's backward pass.

    Args:
        compute: makes the losses of a batch.
        parameters: their gradients are computed, and dropped.
        compiled: the model is; tried here it is not, for its graphs are to be cut where DDP's buckets end.
    """
    torch.use_deterministic_algorithms(True)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            torch.autograd.grad(compute().sum(), list(parameters), allow_unused=True)
    except RuntimeError as error:
        torch.use_deterministic_algorithms(True, warn_only=True)
        return first_sentence(error)
    return None


@contextmanager
def only_preferred() -> Iterator[None]:
    """Warn, rather than fail, of an operation without a deterministic kernel: what is not trained on may use it."""
    demanded = torch.get_deterministic_debug_mode() == 2
    if demanded:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        if demanded:
            torch.use_deterministic_algorithms(True)


@contextmanager
def missing_named() -> Iterator[None]:
    """Name the option when a step after the first needs an operation without a deterministic kernel.

    Raises:
        JobError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if MISSING not in str(error):
            raise
        raise JobError("train.deterministic", True, first_sentence(error), "Set it to false") from error


def first_sentence(error: Exception) -> str:
    """Without torch's advice, which does not fit here."""
    return str(error).split(", but you set")[0].splitlines()[0]
