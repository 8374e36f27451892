"""Compression of gradients, as communication hooks of DistributedDataParallel."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from trainer.config.job import Ddp

HALF = ("bf16", "fp16")
"""These exchange gradients in 16 bits."""


def add_comm_hook(ddp: DistributedDataParallel, options: Ddp) -> None:
    """Register the compression that the job asks for."""
    if options.compression == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=options.powersgd_rank, start_powerSGD_iter=10
        )
        hook = powerSGD_hook.powerSGD_hook
        ddp.register_comm_hook(state, hook if ddp.device_type != "cpu" else lambda s, bucket: finish(hook(s, bucket)))
    elif options.compression == "bf16":  # under another name: torch refuses its own hook with gloo, which can do it
        ddp.register_comm_hook(None, lambda group, bucket: default_hooks.bf16_compress_hook(group, bucket))
    elif options.compression == "fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)


def finish(bucket: Future[Tensor]) -> Future[Tensor]:
    """Wait for a bucket before the next. PowerSGD starts more collectives in callbacks, in any order over buckets.

    gloo pairs collectives by their order: with two buckets, ranks of torch 2.13 aborted.
    """
    bucket.wait()
    return bucket
