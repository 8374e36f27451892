"""What checkpoints hold, for comparisons bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import files


def steps_saved(run: Path) -> list[int]:
    """The steps of the checkpoints of a run folder, ascending."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in run.glob("checkpoints/step-*"))


def read_state(run: Path, step: int | None = None) -> dict[str, Any]:
    """Everything in the checkpoint after `step`, default: the newest; plain torch, but for shards."""
    step = steps_saved(run)[-1] if step is None else step
    folder = run / "checkpoints" / f"step-{step:09d}"
    if not (folder / "model.pt").exists():
        weights, rest = files.read(folder, lambda: None)
        return {"model": weights, **rest}
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return {"model": torch.load(folder / "model.pt", weights_only=True), **state}


def difference(one: Any, other: Any, path: str = "") -> str:
    """The path of the first value that is not equal bit by bit; empty when all are."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return "" if one.dtype == other.dtype and torch.equal(one.to_dense(), other.to_dense()) else path or "."
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):
            return f"{path} keys {list(one)} and {list(other)}"
        return next((found for key in one if (found := difference(one[key], other[key], f"{path}/{key}"))), "")
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return f"{path} lengths"
        pairs = enumerate(zip(one, other, strict=True))
        return next((found for i, (a, b) in pairs if (found := difference(a, b, f"{path}/{i}"))), "")
    return "" if one == other else f"{path}: {one!r} and {other!r}"
