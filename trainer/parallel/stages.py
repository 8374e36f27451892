"""A model cut into stages, of which a rank keeps one: which modules, which weights, and who else has the same ones."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import JobError
from trainer.task import Task

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Cut:
    """Where a model is cut."""

    stages: list[list[nn.Module]]
    """The modules of each stage, in their order."""
    shared: dict[tuple[int, ...], list[nn.Parameter]]
    """Weights that several stages use, by those stages."""


def cut_model(task: Task, model: nn.Module, count: int) -> Cut:
    """Cut a model into `count` stages of about the same size. Raises JobError: it cannot be."""
    parts = list(task.stages(model))
    _check(task, model, parts, count)
    sizes = [sum(weight.nbytes for weight in part.parameters()) for part in parts]
    ends = balance(tuple(sizes), count)
    stages = [parts[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    users: dict[int, list[int]] = {}
    for number, stage in enumerate(stages):
        for weight in unique(stage):
            users.setdefault(id(weight), []).append(number)
    missing = [name for name, weight in model.named_parameters() if id(weight) not in users]
    if missing:
        problem = f"{', '.join(missing[:5])}{' and others' * (len(missing) > 5)} are in none of them"
        raise JobError("task.stages", f"{len(parts)} modules", problem, "Return modules that hold all weights")
    shared: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for weight in model.parameters():
        if len(users[id(weight)]) > 1 and weight.requires_grad:
            shared.setdefault(tuple(users[id(weight)]), []).append(weight)
    return Cut(stages, shared)


def unique(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The weights of some modules, each once."""
    return list({id(weight): weight for module in modules for weight in module.parameters()}.values())


def balance(sizes: tuple[int, ...], count: int) -> list[int]:
    """Where each of `count` rows of parts ends, so that the largest sum of sizes is as small as it can be."""

    @cache
    def best(start: int, rows: int) -> tuple[tuple[int, int], tuple[int, ...]]:
        """The largest sum, and the sum of squares to choose among equals; where the rows from `start` on end."""
        if rows == 1:
            total = sum(sizes[start:])
            return (total, total**2), (len(sizes),)
        found = []
        for end in range(start + 1, len(sizes) - rows + 2):
            own, ((largest, squares), ends) = sum(sizes[start:end]), best(end, rows - 1)
            found.append(((max(own, largest), own**2 + squares), (end, *ends)))
        return min(found)

    return list(best(0, count)[1])


def _check(task: Task, model: nn.Module, parts: list[Any], count: int) -> None:
    kind = type(model).__name__
    if type(task).output is not Task.output:
        problem = "calls the model in its own way, but a stage holds only a part of the model"
        raise JobError("task.output", type(task).__name__, problem, "Give the task inputs(batch) instead, or use fsdp")
    if not parts:
        problem = "is not a torch.nn.Sequential, and the task does not say how to cut it"
        raise JobError("parallel", "pipeline", f"{kind} {problem}", "Give the task a method stages(model)")
    if not all(isinstance(part, nn.Module) for part in parts):
        raise JobError("task.stages", kind, "must be torch.nn.Modules", "Return a list of modules")
    if len(parts) < count:
        problem = f"is more than the {len(parts)} modules that {kind} can be cut into"
        raise JobError("pipeline.stages", count, problem, "Use fewer, or name smaller modules in Task.stages")
    for name, part in model.named_modules():
        if isinstance(part, NORMS) and (part.training or part.running_mean is None):
            problem = f"would compute statistics of single micro-batches ({name or kind})"
            raise JobError("task.model", type(part).__name__, problem, "Use GroupNorm or LayerNorm, or parallel=ddp")


def keep_stage(model: nn.Module, stage: Sequence[nn.Module]) -> None:
    """Drop the values of all weights and buffers that other stages alone use: they go to the meta device.

    So the model keeps its names and shapes, for checkpoints and the optimizer, and this rank the memory.
    """
    own = {id(tensor) for part in stage for tensor in (*part.parameters(), *part.buffers())}
    dropped: dict[int, Any] = {}
    for part in model.modules():
        for name, weight in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(weight) not in own:
                new = dropped.setdefault(id(weight), nn.Parameter(weight.detach().to("meta"), weight.requires_grad))
                setattr(part, name, new)
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            if id(buffer) not in own:
                setattr(part, name, dropped.setdefault(id(buffer), buffer.to("meta")))
    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter in the checkpoint to a meta")


class Stage(nn.Module):
    """What a rank computes of a micro-batch: the modules of its stage; the first makes the model's input itself."""

    def __init__(self, modules: Sequence[nn.Module], first: bool, last: bool, autocast: Callable[[], Any]) -> None:
        super().__init__()
        self.parts, self.first, self.last, self.autocast = nn.ModuleList(modules), first, last, autocast
        self.inputs: list[Any] = []
        """Of the first stage, for each micro-batch."""
        self.scheduled = False
        """Whether torch's schedule calls it, and not an evaluation, whose batches may have any size."""
        self.sizes: list[tuple[torch.dtype, list[int]]] = []
        """What the next stage has room for."""
        self.made: Any = None
        """What the last stage makes, of any type, for the loss; torch's schedule gets a number instead."""

    def forward(self, *values: Tensor) -> Any:
        """What the next stage takes, from what the one before gave; of the first, from a micro-batch's number."""
        value: Any = values[0] if len(values) == 1 else values
        if self.first:
            value = self.inputs[int(values[0])]
        with self.autocast():
            for part in self.parts:
                value = part(value)
        if not self.scheduled:
            return value
        if self.last:
            self.made = value
            return torch.zeros(1, device=values[0].device)
        if (sizes := sizes_of(value)) != self.sizes:
            now, first = (
                ", ".join(f"{str(dtype)[6:]} {shape}" for dtype, shape in each) for each in (sizes, self.sizes)
            )
            problem = f"a stage turns this batch into {now}, but the next stage expects {first}, as for the first batch"
            remedy = "Pad all samples to one size in Task.collate, not to the longest of a batch, or use parallel=fsdp"
            raise JobError("parallel", "pipeline", problem, remedy)
        return value


def sizes_of(given: Any) -> list[tuple[torch.dtype, list[int]]]:
    """The types and shapes of what a stage gives the next one."""
    return [(each.dtype, list(each.shape)) for each in ((given,) if isinstance(given, Tensor) else given)]
