"""`train.deterministic`: on GPUs the same bits from run to run, as far as torch has kernels for them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import JobError

PREFERRED, DEMANDED = 1, 2
"""torch's debug modes: with the first it warns of operations without a deterministic kernel, with the second it fails.

While it only warns it also takes other kernels where it has deterministic ones: in attention's backward pass.
"""
REFUSAL = re.compile(
    r"^.*?(does not have a deterministic implementation|not deterministic because it uses CuBLAS|use_reentrant=True)"
    r".*?(?=, but you set|$)", re.MULTILINE,
)  # fmt: skip
"""The line of an error that tells what cannot be demanded, or not tried: a checkpoint that is re-entered."""


def prefer_deterministic(compiled: bool) -> None:
    """Let kernels be deterministic where torch takes such by itself, and warn of the others.

    `compiled`: the model is. torch's own function tells the compiler too, which it imports for that: 1 s.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS differs from run to run
    if compiled:
        torch.use_deterministic_algorithms(True, warn_only=True)
    else:
        torch.set_deterministic_debug_mode(PREFERRED)
    fill: Any = torch.utils.deterministic
    fill.fill_uninitialized_memory = False  # a kernel more for each new tensor


def why_not_demanded(compute: Callable[[], Tensor], parameters: Iterable[nn.Parameter], compiled: bool) -> str | None:
    """Try whether a step's forward and backward pass can do with deterministic kernels alone; else return why not.

    Args:
        compute: makes the losses of a batch.
        parameters: their gradients are computed, and dropped.
        compiled: the model is; tried here it is not, for its graphs are to be cut where DDP's buckets end.

    Raises:
        RuntimeError: it cannot be computed for another reason.
    """
    torch.set_deterministic_debug_mode(DEMANDED)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            torch.autograd.grad(compute().sum(), list(parameters), allow_unused=True)
    except RuntimeError as error:
        if compiled and isinstance(error, torch.OutOfMemoryError):
            return "there is not the memory to try it without the compiler"
        refusal = REFUSAL.search(str(error))
        if refusal is None:
            raise
        return refusal[0]
    finally:
        torch.set_deterministic_debug_mode(PREFERRED)
    return None


@contextmanager
def refusal_named() -> Iterator[None]:
    """Name the option when a later step needs an operation without a deterministic kernel.

    Raises:
        JobError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        refusal = REFUSAL.search(str(error))
        if refusal is None or torch.get_deterministic_debug_mode() != DEMANDED:
            raise
        raise JobError("train.deterministic", True, refusal[0], "Set it to false") from error
