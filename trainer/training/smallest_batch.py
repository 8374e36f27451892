"""Batch norm and the smallest batch of an epoch: one sample has no variance. Tried before the first step."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.config.job import Job
from trainer.data.sampler import Indices
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.module_state import evaluation_mode
from trainer.parallel.step import Step
from trainer.training.unchanged import unchanged

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_smallest_batch(
    job: Job, parallel: Parallel, count: int, eval_count: int, read: Callable[[Indices], Any]
) -> None:  # fmt: skip
    """Compute one sample where a device will get one, and the model has batch norms that compute statistics then.

    `count`: of the training samples that are used; `read` makes a batch of some. Raises JobError: a norm refuses it.
    """
    model = parallel.step.model
    norms = {name: part for name, part in model.named_modules() if isinstance(part, BATCH_NORMS)}
    parts, replicas = job.parts * job.train.accumulate, job.devices_per_node if job.parallel == "dp" else 1
    for key, size, samples, shares, concerned in (
        ("train.batch_size", job.train.batch_size, count, parts, [n for n, norm in norms.items() if norm.training]),
        ("evaluation.batch_size", job.evaluation.batch_size, eval_count, 1,
         [name for name, norm in norms.items() if norm.running_mean is None]),
    ):  # fmt: skip
        if not concerned or smallest_share(samples, size, shares, replicas) > 1:
            continue
        mode = nullcontext() if key == "train.batch_size" else evaluation_mode(model)
        with mode:
            if not refuses(parallel.step, read(np.zeros(1, dtype=np.int64))):
                continue
        others = (size + sign * more * shares for more in range(1, size + 1) for sign in (1, -1))
        better = next((n for n in others if n > 0 and smallest_share(samples, n, shares, replicas) > 1), None)
        problem = (
            f"with {samples} samples some batch gives a device a single sample, and a batch norm "
            f"({concerned[0] or type(model).__name__}) cannot compute statistics of one sample"
        )
        remedy = f"Use {better or 'another size'}, leave a sample out, or use a norm that needs no batch: GroupNorm"
        raise JobError(key, size, problem, remedy)


def refuses(step: Step, batch: Any) -> bool:
    """Whether a batch norm of the model refuses a batch of one sample."""
    try:
        with torch.no_grad(), unchanged(step.model, step.task), step.autocast():
            step.task.output(step.model, batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return True
    return False


def smallest_share(count: int, batch_size: int, parts: int, replicas: int) -> int:
    """The least number of `count` samples that a device computes at once.

    `parts`: of a batch, over ranks and micro-batches; `replicas`: of DataParallel.
    """
    batches = {min(batch_size, count), count % batch_size or batch_size}
    shares = {max(1, share) for samples in batches for share in (samples // parts, -(-samples // parts))}
    return min(_last_chunk(share, replicas) for share in shares)


def _last_chunk(samples: int, parts: int) -> int:
    """The size of the last of the chunks that `torch.chunk` makes, which is the smallest."""
    size = math.ceil(samples / parts)
    return samples - size * (math.ceil(samples / size) - 1)
