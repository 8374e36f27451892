"""The modes of one process, single and DataParallel, and the choice of a mode."""

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from trainer.config.job import Job
from trainer.data.nested import map_tensors
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.step import Step
from trainer.wiring.rank import RankWiring


class DataParallel(Parallel):
    """One process that computes each batch in parts: on several GPUs, or in several threads."""

    def wrap(self, step: Step) -> None:
        super().wrap(step)
        replicas = self.job.devices_per_node
        self.module = nn.DataParallel(step, self.devices) if self.cuda else ThreadReplicas(step, replicas)


def make_parallel(job: Job, wiring: RankWiring, supervised: bool) -> Parallel:
    """Make the mode that the job asks for; `supervised`: an agent watches this rank's heartbeat."""
    if job.parallel == "ddp":
        from trainer.parallel.ddp import Distributed

        return Distributed(job, wiring, supervised)
    return DataParallel(job, wiring) if job.parallel == "dp" else Parallel(job, wiring)


class ThreadReplicas(nn.Module):
    """DataParallel on a CPU, where torch's does nothing: it does the same four steps in threads.

    Replicate the module, scatter the batch along dimension 0, apply in `replicas` threads, gather the outputs.
    Chunks of different sizes are exact, because outputs are per sample. The gradients of all replicas add up in the
    original. Layers that draw random numbers share one generator, in the order in which the threads reach it.
    """

    def __init__(self, module: nn.Module, replicas: int) -> None:
        super().__init__()
        self.module, self.replicas = module, replicas
        # A thread each: autograd adds gradients in the order of its threads' operations, which must not be chance.
        self.threads = [ThreadPoolExecutor(1, thread_name_prefix=f"replica-{number}") for number in range(replicas)]

    def forward(self, batch: Any, evaluate: bool = False) -> Any:
        """Compute the module's outputs for the whole batch, in the order of its samples."""
        chunks = scatter(batch, self.replicas)
        replicas = [self.module, *(replicate(self.module) for _ in chunks[1:])]
        grad = torch.is_grad_enabled()

        def apply(replica: nn.Module, chunk: Any) -> Any:
            with torch.set_grad_enabled(grad):
                return replica(chunk, evaluate)

        calls = zip(self.threads, replicas, chunks, strict=False)
        outputs = [future.result() for future in [thread.submit(apply, *call) for thread, *call in calls]]
        if isinstance(outputs[0], Mapping):
            return {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}
        return torch.cat(outputs)


def scatter(batch: Any, parts: int) -> list[Any]:
    """Cut the tensors of a batch as `torch.chunk` does, into at most `parts`; everything else goes into each part."""
    counts: dict[int, Any] = {}
    map_tensors(batch, lambda tensor: counts.setdefault(len(tensor.chunk(parts)), tensor))

    def part(index: int) -> Any:
        return map_tensors(batch, lambda tensor: tensor.chunk(parts)[index])

    return [part(index) for index in range(min(counts, default=parts))]


def replicate(module: nn.Module) -> nn.Module:
    """Copy the modules and their buffers. All replicas compute with the original's parameters.

    Other attributes are the same objects in the replica, as with `torch.nn.DataParallel`. Only dicts are copied,
    because torch keeps submodules, parameters and buffers in dicts, and empty ones need no copy.
    """
    kept: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for part in module.modules():
        kept |= {id(value): value for value in vars(part).values() if not (isinstance(value, dict) and value)}
    buffers = {id(buffer): buffer.clone() for buffer in module.buffers()}
    try:
        return copy.deepcopy(module, kept | buffers)  # a deep copy takes from this dict what it finds there
    except TypeError as error:
        problem = f"the model cannot be copied for each device: {error}"
        raise JobError("parallel", "dp", problem, "Use ddp, or keep such things outside of the model") from error
