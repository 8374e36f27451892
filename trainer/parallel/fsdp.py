"""fsdp: each rank holds a part of every weight, and the layers are gathered one at a time (torch's `fully_shard`)."""

import contextlib
import ctypes
import hashlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainer.config.job import Job
from trainer.data.nested import INSIDE, leaves, walk
from trainer.errors import JobError
from trainer.parallel.group import Group
from trainer.parallel.messages import bytes_of
from trainer.parallel.module_state import is_dense
from trainer.parallel.shards import Part, cut
from trainer.parallel.step import Step, apply_model, compile_call
from trainer.parallel.units import Units, find_units, replace_forward
from trainer.task import Task
from trainer.wiring.rank import RankWiring
from trainer.wiring.variables import run_is_shared

M_MMAP_THRESHOLD, LARGE = -3, 1 << 18
META = torch.device("meta")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FullyShard(Group):
    """One process for each device, with a shard of the weights, gradients and optimizer state."""

    lockstep = True

    def __init__(self, job: Job, wiring: RankWiring, supervised: bool) -> None:
        if job.nodes > 1 and not run_is_shared():
            problem = "writes a part of each checkpoint on every node, and these nodes do not share a run folder"
            raise JobError("parallel", "fsdp", problem, "Use parallel=ddp, or a site whose nodes share a volume")
        super().__init__(job, wiring, supervised)
        if not self.cuda:
            give_back_memory()
        self.mesh = make_mesh(job, self.device.type, self.timeout)
        last = self.mesh.ndim - 1
        self.shard = self.mesh.get_local_rank(last), self.mesh.size(last)
        self.placements = [*[Replicate()] * last, Shard(0)]

    def build(self, task: Task, seed: Callable[[], None]) -> tuple[nn.Module, torch.device]:
        """Rank 0 builds the model, on the CPU; the others only its shapes, and get the values when it is sharded.

        Where a model needs values to be built, or keeps tensors that are no buffers, the others build it, too.
        """
        if self.rank:
            try:
                seed()
                with META:
                    model = task.model()
                if _lacks_weights_alone(model, task):
                    return model, META
            except Exception:  # on the CPU it is the user's error, or none
                pass
        seed()
        return task.model(), torch.device("cpu")

    def wrap(self, step: Step) -> None:
        units = find_units(step.model, step.task.shard_modules(step.model), self.job.fsdp.min_params)
        if self.job.train.compile:
            step.apply_model = apply_model
            parts = list(units.values()) or [step.model]
            torch.compiler.config.recompile_limit *= len(parts)  # they share it: layers may differ in a number
            for part in parts:
                replace_forward(part, compile_call)
        self.layers = self.shard_module(step, step.model, units)
        super().wrap(step)

    def shard_module(self, root: nn.Module, model: nn.Module, units: Units) -> list[FSDPModule]:
        """Shard a model layer by layer, and the rest of it as `root`, which is called from outside; all of these."""
        self._check(model)
        half = HALVES[self.job.train.precision] if self.job.fsdp.gather == "half" else None
        # Gradients are added in the numbers of the weights, whatever the layers compute in.
        policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
        layers: list[FSDPModule] = []
        self._fill(model, lambda module: module.named_buffers(recurse=False, remove_duplicate=False))
        for name, part in (*units.items(), ("", root)):
            check_types(part, name)
            self._fill(part, lambda module: module.named_parameters(recurse=False, remove_duplicate=False))
            try:
                fully_shard(
                    part, mesh=self.mesh, mp_policy=policy, reshard_after_forward=self.job.fsdp.reshard_after_forward
                )
            except (AssertionError, NotImplementedError, ValueError, RuntimeError) as error:
                problem = f"cannot shard {name or 'the model'}: {' '.join(str(error).split())}"
                raise JobError("parallel", "fsdp", problem, "Use parallel=ddp, or change the model") from error
            assert isinstance(part, FSDPModule)
            if not self.cuda:  # nothing runs beside the CPU: a layer that is gathered early only takes memory
                part.set_modules_to_backward_prefetch([part])
            layers.append(part)
        return layers

    def _check(self, model: nn.Module) -> None:
        """Raises JobError: a weight cannot be cut, or another rank has built another model."""
        named = [*model.named_parameters(), *model.named_buffers()]
        for name, weight in model.named_parameters():
            if not weight.dim():
                problem = "has no dimension along which fsdp could cut it"
                raise JobError("task.model", name, problem, "Give it the shape (1,), or use parallel=ddp")
        shapes = repr([(name, tuple(value.shape), value.dtype) for name, value in named])
        if len(set(self.gather(hashlib.sha256(shapes.encode()).hexdigest()))) > 1:
            problem = "is not the same on all ranks: names, shapes or types of its weights differ"
            raise JobError("task.model", type(model).__name__, problem, "Build the same model on every rank")

    def _fill(self, part: nn.Module, tensors: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]) -> None:
        """Give what is not sharded yet the values of rank 0, on the device. What is tied stays tied."""
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for module in part.modules():
            for name, old in list(tensors(module)):
                if isinstance(old, DTensor) or not is_dense(old):
                    continue
                if id(old) not in made:
                    made[id(old)] = old, self._take(old)
                setattr(module, name, made[id(old)][1])

    def _take(self, old: Tensor) -> Tensor:
        """A weight or buffer as rank 0 has it."""
        if self.rank and old.is_meta:
            new = torch.empty(old.shape, dtype=old.dtype, device=self.device)
        else:
            new = old.detach().to(self.device).contiguous()
        if self.world_size > 1 and new.numel():
            dist.broadcast(bytes_of(new), 0)
        if not isinstance(old, nn.Parameter):
            return new
        weight = nn.Parameter(new, old.requires_grad)
        vars(weight).update(vars(old))
        return weight

    def compute(self, batch: Any, count: int, evaluate: bool = False) -> Any:
        """No backward pass follows, which would give up what was gathered."""
        result = super().compute(batch, count, evaluate)
        for part in self.layers:
            part.reshard()
        return result

    def losses(self, batch: Any, count: int, last: bool = True) -> Tensor:
        losses: Tensor = self.module(batch)
        return losses

    def spread(self, item: Any, state: Any) -> Any:
        """Cut what a checkpoint has as a whole, and make DTensors of parts."""
        if isinstance(item, nn.Module):
            own = item.state_dict(keep_vars=True)
            state = {name: self._like(value, own.get(name)) for name, value in state.items()}
        elif isinstance(item, torch.optim.Optimizer):
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            weights = [weight for group in item.param_groups for weight in group["params"]]
            of = dict(zip(numbers, weights, strict=False))  # torch refuses what does not fit
            states = {
                number: {name: self._like(value, of.get(number)) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            state = {**state, "state": states}
        return walk(state, lambda part: self._join(part) if isinstance(part, Part) else INSIDE)

    def _like(self, value: Any, weight: Any) -> Any:
        """A value, in parts if the weight is that it is of, or goes with."""
        whole = isinstance(value, Tensor) and isinstance(weight, DTensor) and value.shape == weight.shape
        return cut(value, *self._own_shard()) if whole else value

    def _own_shard(self) -> tuple[int, int]:
        assert self.shard is not None
        return self.shard

    def _join(self, part: Part) -> Tensor:
        like = torch.empty(part.shape, dtype=part.rows.dtype, device="meta")
        rows, shape = part.rows.to(self.device), like.shape
        return DTensor.from_local(rows, self.mesh, self.placements, run_check=False, shape=shape, stride=like.stride())

    def differing_weights(self) -> list[str]:
        """Each rank has a part of its own."""
        return []


def check_types(layer: nn.Module, name: str) -> None:
    """Refuse a layer whose gradients cannot be reduced together. Raises JobError."""
    trained = [weight for weight in layer.parameters() if weight.requires_grad and not isinstance(weight, DTensor)]
    types = sorted({str(weight.dtype) for weight in trained})
    if len(types) > 1:
        problem = f"trains weights of {' and '.join(types)} in one layer, which torch cannot shard together"
        remedy = "Let Task.shard_modules give each type layers of its own, or use parallel=ddp"
        raise JobError("task.model", name or "outside of the layers", problem, remedy)


def give_back_memory() -> None:
    """Have layers that are given up leave this process: glibc would keep their memory, several times the shards.

    It learns from the first large block that is freed to keep such blocks; a threshold that is set stays (mallopt(3)).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def make_mesh(job: Job, kind: str, limit: timedelta) -> DeviceMesh:
    """All ranks in a row, or a row for each node, which holds the whole model (`fsdp.replicate: node`).

    Of groups that have the time limits of the whole one, which torch's own function to make a mesh would not give them.
    """
    whole = dist.group.WORLD
    assert whole is not None
    if job.fsdp.replicate == "none":
        return DeviceMesh.from_group(whole, kind)
    ranks = torch.arange(job.world_size, device="cpu").view(job.nodes, job.devices_per_node)
    groups = [dist.new_subgroups_by_enumeration(lists.tolist(), limit)[0] for lists in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _lacks_weights_alone(model: nn.Module, task: Task) -> bool:
    """Whether what has no values are weights and dense buffers, and nothing else."""
    beside = [value for part in model.modules() for value in leaves(dict(vars(part)))]
    own = {id(value) for value in (*model.parameters(), *model.buffers())}
    others = [value for value in (*beside, *leaves(dict(vars(task)))) if isinstance(value, Tensor)]
    return all(is_dense(value) for value in model.buffers()) and not any(
        value.is_meta for value in others if id(value) not in own
    )
