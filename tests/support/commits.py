"""Commit checkpoints in a process that is killed at its n-th file operation."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import durable
from trainer.checkpoint import files as checkpoint

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
"""Audit events of Python; `os.fsync` and writes into a payload are counted beside them."""


def payload(value: float) -> dict[str, Any]:
    """What a checkpoint holds; `value` tells two of them apart."""
    return {"model.pt": {"weight": torch.full((300,), value)}, "state.pt": {"position": {"step": 1}, "value": value}}


def value_of(folder: Path) -> float:
    """Of `payload`, read from both files."""
    weights, state = checkpoint.read(folder, lambda: None)
    weight, value = weights["weight"], state["value"]
    assert torch.equal(weight, torch.full((300,), value)), "files of two checkpoints were mixed"
    return float(value)


def commit_until_killed(root: Path, step: int, value: float, keep_last: int, best: str | None, count: int) -> None:
    """Commit and prune; SIGKILL before file operation number `count`."""
    left = count
    fsync, write = os.fsync, durable.Hashing.write

    def operation() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(handle: int) -> None:
        operation()
        fsync(handle)

    def counted_write(self: durable.Hashing, data: Any) -> int:
        operation()
        return write(self, data)

    os.fsync, durable.Hashing.write = counted_fsync, counted_write  # type: ignore[assignment, method-assign]
    sys.addaudithook(lambda event, _: operation() if event in OPERATIONS else None)
    checkpoint.commit(root, step, payload(value), {}, 0)
    checkpoint.prune(root, keep_last, best)
