"""The weights of a checkpoint as one file that everybody reads: plain PyTorch, or safetensors.

Tensors go through one at a time: what is read, and what PyTorch's own writer is given, lies in the pages of files,
which the kernel may drop.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import safetensors
from trainer.checkpoint.durable import new_file
from trainer.checkpoint.files import DamagedCheckpoint, is_sharded, newest_good, verify, weights_with_markers
from trainer.checkpoint.safetensors import NAMES, Kind, Tensors
from trainer.checkpoint.sharded import Sharded, Shards
from trainer.errors import JobError
from trainer.run.folder import RunFolder, committed, step_of

SUFFIXES = (".pt", ".pth", ".safetensors")


def export(run: RunFolder, target: Path, step: int | None) -> Path:
    """Write the weights of the newest checkpoint that is whole, or of one after a step; return its folder.

    Raises JobError: there is none, it is damaged, or the file cannot hold it.
    """
    if target.suffix not in SUFFIXES:
        remedy = f"Give it one of the endings {', '.join(SUFFIXES)}"
        raise JobError("file", str(target), "does not say which format to write", remedy)
    folder = find(run, step)
    draft, other = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("draft", "tensors"))
    try:
        weights = weights_with_markers(folder)
        if target.suffix == ".safetensors":
            write(folder, dict(flatten(weights)), draft)
        elif is_sharded(folder):  # put together first: PyTorch's writer wants all tensors at once
            sharded = {name: value for name, value in flatten(weights) if isinstance(value, Sharded)}
            write(folder, sharded, other)
            save(nest(weights, Tensors(other)), draft)
        else:
            save(weights, draft)
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
    return folder


def find(run: RunFolder, step: int | None) -> Path:
    """The checkpoint to export, verified."""
    if step is not None:
        folder = run.checkpoints / f"step-{step:09d}"
        if not folder.is_dir():
            steps = ", ".join(str(step_of(path)) for path in reversed(committed(run.checkpoints)))
            raise JobError("--step", step, "has no checkpoint in this run", f"There are: {steps or 'none'}")
        try:
            verify(folder)
        except DamagedCheckpoint as error:
            raise JobError("--step", step, str(error), "Take another step, or leave it out") from None
        return folder
    try:
        newest, _ = newest_good(run.checkpoints)
    except DamagedCheckpoint as error:
        raise JobError("run", run.name, str(error), "There is nothing to export") from None
    if newest is None:
        raise JobError("run", run.name, "has no checkpoint", "Let it train until it has saved one")
    return newest


def flatten(weights: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors, and what else modules keep, by their names; those of several modules begin with the module's."""
    for name, value in weights.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def nest(weights: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """The weights with tensors by their flat names."""
    return {
        name: nest(value, tensors, f"{prefix}{name}.")
        if isinstance(value, Mapping)
        else tensors.get(f"{prefix}{name}", value)
        for name, value in weights.items()
    }


def write(folder: Path, weights: Mapping[str, Any], draft: Path) -> None:
    """A safetensors file. The bytes of a tensor are those of its shards, one after the other.

    Raises JobError: it cannot hold one of them.
    """
    shards = Shards(folder)
    found: dict[str, tuple[Kind, Any]] = {}
    for name, value in weights.items():
        if isinstance(value, Sharded):
            found[name] = shards.kind(value), shards.pieces(value)
        elif isinstance(value, Tensor) and value.dtype in NAMES and value.layout is torch.strided:
            found[name] = (value.dtype, tuple(value.shape)), [value]
        else:
            what = (
                f"{value.layout} of {value.dtype}" if isinstance(value, Tensor) else f"a Python {type(value).__name__}"
            )
            problem = f"a safetensors file cannot hold {name}, which is {what}"
            raise JobError("file", ".safetensors", problem, "Export it as model.pt")
    with new_file(draft) as file:
        safetensors.write(found, {"format": "pt"}, file)


def save(weights: Mapping[str, Any], draft: Path) -> None:
    """What `torch.load` reads."""
    with new_file(draft) as file:
        torch.save(dict(weights), file)
