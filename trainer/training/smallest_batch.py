"""Batch norm and the smallest batch of an epoch: one sample has no variance. Tried before the first step."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.config.job import Job
from trainer.data.sampler import Indices
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.module_state import unchanged

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_smallest_batch(job: Job, parallel: Parallel, count: int, read: Callable[[Indices], Any]) -> None:
    """Compute one sample where a step will give one to a device, and the model has batch norms that train.

    `count`: of the training samples that are used; `read` makes a batch. Raises JobError: a batch norm refuses it.
    """
    step = parallel.step
    norms = [name for name, part in step.model.named_modules() if isinstance(part, BATCH_NORMS) and part.training]
    if not norms or smallest_share(job, count, job.train.batch_size) > 1:
        return
    batch = read(np.zeros(1, dtype=np.int64))
    try:
        with torch.no_grad(), unchanged(step.model), step.autocast():
            step.model(step.task.inputs(batch))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        size = job.train.batch_size
        parts = job.world_size * job.train.accumulate
        others = (size + sign * more * parts for more in range(1, size + 1) for sign in (1, -1))
        better = next((other for other in others if other > 0 and smallest_share(job, count, other) > 1), None)
        remedy = f"Use {better}, " if better else "Use another size, "
        problem = (
            f"with {count} training samples some step leaves a device one sample, of which a batch norm "
            f"({norms[0] or type(step.model).__name__}) cannot compute statistics"
        )
        remedy += "leave a sample out of train_dataset, or use a norm that needs no batch, such as GroupNorm"
        raise JobError("train.batch_size", size, problem, remedy) from None


def smallest_share(job: Job, count: int, batch_size: int) -> int:
    """The least number of samples that a device computes at once in an epoch of `count` samples."""
    parts, replicas = job.world_size * job.train.accumulate, job.devices_per_node if job.parallel == "dp" else 1
    steps = {min(batch_size, count), count % batch_size or batch_size}
    shares = {max(1, share) for samples in steps for share in (samples // parts, -(-samples // parts))}
    return min(_last_chunk(share, replicas) for share in shares)


def _last_chunk(samples: int, parts: int) -> int:
    """The size of the last of the chunks that `torch.chunk` makes, which is the smallest."""
    size = math.ceil(samples / parts)
    return samples - size * (math.ceil(samples / size) - 1)
