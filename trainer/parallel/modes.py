"""The modes of one process, single and DataParallel, and the choice of a mode."""

import copy
import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trainer.config.job import Job
from trainer.data.device_mover import move_batch
from trainer.data.nested import CLOSED, INSIDE, leaves, walk
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.step import Step
from trainer.wiring.rank import RankWiring


class DataParallel(Parallel):
    """One process that computes each batch in parts: on several GPUs, or in several threads."""

    def wrap(self, step: Step) -> None:
        super().wrap(step)
        replicas = self.job.devices_per_node
        self.module = GpuReplicas(step, self.devices) if self.cuda else ThreadReplicas(step, replicas)

    def compute(self, batch: Any, count: int, evaluate: bool = False) -> Any:
        return self.module(batch, evaluate, count)


def make_parallel(job: Job, wiring: RankWiring, supervised: bool) -> Parallel:
    """Make the mode that the job asks for; `supervised`: an agent watches this rank's heartbeat."""
    if job.parallel == "ddp":
        from trainer.parallel.ddp import Distributed

        return Distributed(job, wiring, supervised)
    if job.parallel == "fsdp":
        from trainer.parallel.fsdp import FullyShard

        return FullyShard(job, wiring, supervised)
    if job.parallel == "pipeline":
        from trainer.parallel.pipeline import Pipeline

        return Pipeline(job, wiring, supervised)
    if job.parallel == "server":
        from trainer.parallel.server import make_server

        return make_server(job, wiring, supervised)
    return DataParallel(job, wiring) if job.parallel == "dp" else Parallel(job, wiring)


class GpuReplicas(nn.DataParallel[Step]):
    """torch's own, which cuts batches as we do: torch knows fewer kinds, and gives each replica all texts."""

    def scatter(self, inputs: tuple[Any, ...], kwargs: dict[str, Any] | None, device_ids: Any) -> Any:
        """The parts of the batch, each on its device."""
        batch, evaluate, count = inputs
        parts = zip(scatter(batch, len(device_ids), count), device_ids, strict=False)
        moved = [(move_batch(part, torch.device("cuda", device)), evaluate) for part, device in parts]
        return moved, [{}] * len(moved)

    def replicate(self, module: Step, device_ids: Any) -> list[Step]:
        return give_tasks(super().replicate(module, device_ids))


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

    def forward(self, batch: Any, evaluate: bool = False, count: int | None = None) -> Any:
        """Compute the module's outputs for the whole batch, in the order of its `count` samples."""
        chunks = scatter(batch, self.replicas, count)
        replicas = give_tasks([self.module, *(replicate(self.module) for _ in chunks[1:])])
        grad = torch.is_grad_enabled()

        def apply(replica: nn.Module, chunk: Any) -> Any:
            with torch.set_grad_enabled(grad):
                return replica(chunk, evaluate)

        calls = zip(self.threads, replicas, chunks, strict=False)
        outputs = [future.result() for future in [thread.submit(apply, *call) for thread, *call in calls]]
        if isinstance(outputs[0], Mapping):
            return {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}
        return torch.cat(outputs)


def give_tasks(replicas: list[Any]) -> list[Any]:
    """Give each replica a task of its own, so that it finds again what it keeps there for a moment, such as inputs."""
    for replica in replicas[1:]:
        if isinstance(replica, Step):
            replica.task = copy.copy(replica.task)
    return replicas


def scatter(batch: Any, parts: int, count: int | None = None) -> list[Any]:
    """Cut a batch of `count` samples, by default as many as its first tensor says, as `torch.chunk` does.

    What has an element per sample is cut: tensors, arrays, and lists, such as of texts. All else goes into each part.
    Raises JobError: nothing has an element per sample, or a part is of a kind that cannot be cut.
    """
    if count is None:
        count = next(len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor))
    if parts == 1:
        return [batch]
    size = -(-count // parts)
    return [cut(batch, slice(start, start + size), count) for start in range(0, count, size)]


def cut(batch: Any, place: slice, count: int, mode: str = "dp") -> Any:
    """The samples of a batch at a place. Raises JobError: see `scatter`; `mode`: which one it is cut for."""
    found = False

    def take(part: Any) -> Any:
        nonlocal found
        if is_column(part, count):
            found = True
            return part[place]
        if isinstance(part, (Tensor, np.ndarray)):
            return part
        named = isinstance(part, (*CLOSED, Mapping, tuple, list)) or dataclasses.is_dataclass(part)
        if isinstance(part, PackedSequence) or (callable(getattr(part, "to", None)) and not named):
            problem = f"cannot cut a batch of type {type(part).__name__}"
            raise JobError("parallel", mode, problem, "Use parallel=ddp, whose ranks each collate a batch of their own")
        return INSIDE

    part = walk(batch, take)
    if not found:
        problem = f"finds nothing to cut in a batch of type {type(batch).__name__}"
        remedy = "Let Task.collate return tensors or lists with an element for each sample, or use parallel=ddp"
        raise JobError("parallel", mode, problem, remedy)
    return part


def is_column(part: Any, count: int) -> bool:
    """Whether a part of a batch has an element for each of `count` samples; a pair of two columns is none itself."""
    if isinstance(part, (Tensor, np.ndarray)):
        return bool(part.ndim) and len(part) == count
    if not isinstance(part, (list, tuple)) or hasattr(part, "_fields") or len(part) != count:
        return False
    return not any(isinstance(item, (Tensor, np.ndarray)) and is_column(item, count) for item in part)


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
