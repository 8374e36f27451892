"""DataParallel without GPUs: the same four steps with threads, so that the mode runs and is tested anywhere.

`torch.nn.DataParallel` passes through on a CPU; on GPUs it is used itself (`trainer.parallel.modes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


class ThreadReplicas(nn.Module):
    """Replicate the module, scatter the batch along dimension 0, apply in threads, gather the outputs.

    Uneven chunks are exact, because outputs are per sample. Gradients of the replicas add up in the original.
    Layers that draw random numbers share one generator, in the order in which the threads reach it.
    """

    def __init__(self, module: nn.Module, replicas: int) -> None:
        """`replicas`: how many threads compute at the same time."""
        super().__init__()
        self.module = module
        self.replicas = replicas
        self.threads = ThreadPoolExecutor(replicas, thread_name_prefix="replica")

    def forward(self, batch: Any, evaluate: bool = False) -> Any:
        """Compute the module's outputs for the whole batch, in the order of its samples."""
        chunks = scatter(batch, self.replicas)
        copies = [self.module, *(replicate(self.module) for _ in chunks[1:])]
        grad = torch.is_grad_enabled()

        def apply(copy: nn.Module, chunk: Any) -> Any:
            with torch.set_grad_enabled(grad):
                return copy(chunk, evaluate)

        work = [self.threads.submit(apply, copy, chunk) for copy, chunk in zip(copies, chunks, strict=True)]
        return gather([item.result() for item in work])


def scatter(batch: Any, parts: int) -> list[Any]:
    """Cut the tensors of a batch as `torch.chunk` does: at most `parts` pieces; each gets all that is no tensor."""
    if isinstance(batch, Tensor):
        return list(batch.chunk(parts))
    if isinstance(batch, Mapping) and batch:
        columns = (scatter(value, parts) for value in batch.values())
        return [dict(zip(batch, piece, strict=True)) for piece in zip(*columns, strict=False)]
    if isinstance(batch, (tuple, list)) and batch:
        pieces = zip(*(scatter(value, parts) for value in batch), strict=False)
        if hasattr(batch, "_fields"):
            return [type(batch)(*piece) for piece in pieces]
        return [type(batch)(piece) for piece in pieces]
    return [batch] * parts


def gather(outputs: list[Any]) -> Any:
    """Join outputs along dimension 0."""
    if isinstance(outputs[0], Mapping):
        return {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}
    return torch.cat(outputs)


def replicate(module: nn.Module, seen: dict[int, Any] | None = None) -> nn.Module:
    """Copy a module so that its parameters are differentiable copies of the original's (tied ones stay tied)."""
    seen = {} if seen is None else seen
    if id(module) in seen:
        return seen[id(module)]  # type: ignore[no-any-return]
    copy = module._replicate_for_data_parallel()
    seen[id(module)] = copy
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else replicate(child, seen)
    for name, parameter in module._parameters.items():
        if parameter is None:  # a layer without bias
            copy._parameters[name] = None
            continue
        tensor = seen.setdefault(id(parameter), parameter.clone())
        setattr(copy, name, tensor)  # a plain attribute: a clone is no leaf, so no nn.Parameter
    for name, buffer in module._buffers.items():
        copy._buffers[name] = None if buffer is None else buffer.clone()
    return copy  # type: ignore[no-any-return]
