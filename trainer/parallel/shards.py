"""Tensors of which each rank holds a part: whole rows, as many as `torch.chunk` would give it.

A `Part` says the same as torch's DTensor, without its process group: it can lie in a file, and in another process.
Never imports what torch has for DTensors: that takes 0.7 s, which modes without shards do not pay.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Rows of a tensor."""

    rows: Any
    """A tensor, or what stands for it while it is somewhere else."""
    shape: tuple[int, ...]
    """Of the whole."""
    start: int
    """Which of its rows is the first."""


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def part_of(tensor: Tensor) -> Part | None:
    """What this rank holds of a DTensor, None of one that each rank holds as a whole, such as all plain ones."""
    placements: Any = getattr(tensor, "placements", None)
    if placements is None or all(each.is_replicate() for each in placements):
        return None
    *others, last = placements
    if any(not each.is_replicate() for each in others) or not last.is_shard(0):
        raise ValueError(f"a tensor is cut as {placements}: only whole rows can be saved, each by one rank of a node")
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    start, _ = span(tensor.shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))
    return Part(local(tensor), tuple(tensor.shape), start)


def span(rows: int, index: int, count: int) -> tuple[int, int]:
    """The first row of part `index` of `count`, and the one after its last."""
    size = -(-rows // count)
    return min(index * size, rows), min((index + 1) * size, rows)


def cut(whole: Tensor, index: int, count: int) -> Part:
    """Part `index` of `count` of a tensor, in memory of its own."""
    start, end = span(whole.shape[0], index, count)
    return Part(whole[start:end].clone(memory_format=torch.contiguous_format), tuple(whole.shape), start)
