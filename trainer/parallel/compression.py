"""Compression of gradients, as communication hooks of DistributedDataParallel."""

from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from trainer.config.job import Ddp

HALF = ("bf16", "fp16")
"""These exchange gradients in 16 bits."""


def add_comm_hook(ddp: DistributedDataParallel, options: Ddp) -> None:
    """Register the compression that the job asks for."""
    if options.compression == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, options.powersgd_rank, start_powerSGD_iter=10)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook if ddp.device_type != "cpu" else one_by_one)
    elif options.compression in HALF:
        hook = getattr(default_hooks, f"{options.compression}_compress_hook")
        # Under another name, because torch refuses its own hook for bf16 with gloo, which can do it.
        ddp.register_comm_hook(None, lambda group, bucket: hook(group, bucket))


def one_by_one(state: powerSGD_hook.PowerSGDState, bucket: GradBucket) -> Future[Tensor]:
    """Finish a bucket before the next. PowerSGD starts more collectives in callbacks, in any order over buckets.

    gloo pairs collectives by their order: with two buckets, ranks of torch 2.13 aborted.
    """
    result = powerSGD_hook.powerSGD_hook(state, bucket)
    result.wait()
    return result
