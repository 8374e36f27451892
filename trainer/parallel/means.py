"""Means of named numbers over the ranks of a process group."""

import zlib

import torch
import torch.distributed as dist

from trainer.parallel.messages import gather

NAMES = 16
"""That one small collective takes."""


def mean_over_ranks(values: dict[str, float], world_size: int) -> dict[str, float]:
    """The mean of each name over the ranks that have it.

    One small collective where all ranks have the same names, which a checksum of them tells.
    """
    sums = torch.zeros(NAMES + 3, dtype=torch.float64, device="cpu")
    check = zlib.crc32(",".join(values).encode()) % 2**20  # whose square is exact
    fits = len(values) <= NAMES
    sums[:3] = torch.tensor([check, check**2, not fits], dtype=torch.float64)
    if fits:
        sums[3 : 3 + len(values)] = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    total, squares, unfit, *means = sums.tolist()
    if not unfit and total**2 == squares * world_size:
        return {name: mean / world_size for name, mean in zip(values, means, strict=False)}
    every = gather(values, world_size)
    names = dict.fromkeys(name for each in every for name in each)
    found = {name: [each[name] for each in every if name in each] for name in names}
    return {name: sum(some) / len(some) for name, some in found.items()}
