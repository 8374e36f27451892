"""`train.deterministic`: on GPUs the same bits from run to run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.errors import JobError

DEBUG_MODES = {"true": 2, "warn": 1, "false": 0}
"""torch's debug mode for each choice: with 2 an operation without a deterministic kernel fails, with 1 torch warns."""


def choose_kernels(deterministic: str, compiled: bool) -> None:
    """Let torch take deterministic kernels; call it before CUDA is used.

    `compiled`: the model is. Then torch must tell its compiler too, and the function that does imports it for that, in
    1 s: 822 modules. The debug mode alone does the same for what is not compiled.
    """
    if deterministic == "false":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS differs from run to run
    if compiled:
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
    else:
        torch.set_deterministic_debug_mode(DEBUG_MODES[deterministic])
    fill: Any = torch.utils.deterministic
    fill.fill_uninitialized_memory = False  # a kernel more for each new tensor


@contextmanager
def any_kernels() -> Iterator[None]:
    """Only warn of other kernels meanwhile: an evaluation changes no weights."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(min(mode, DEBUG_MODES["warn"]))
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def missing_kernels_named() -> Iterator[None]:
    """Raise a JobError that names the option, not torch's RuntimeError, for an operation without such a kernel."""
    try:
        yield
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if "deterministic" in line]
        if not lines or torch.get_deterministic_debug_mode() != DEBUG_MODES["true"]:
            raise
        problem = lines[0].partition(", but you set")[0]
        remedy = "Set it to warn, and two runs may differ; or use another operation"
        raise JobError("train.deterministic", True, problem, remedy) from error
