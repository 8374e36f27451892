"""A model in stages, each on a rank of its own, through which micro-batches follow each other; torch has the schedules.

Ranks come stage by stage: rank 0 to S - 1 are a pipeline, the next S another one. Each pipeline computes a part of the
global batch, and those of the same stage add up their gradients. What pipelines are made of is in
`trainer.parallel.stages`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from trainer.config.job import Job
from trainer.data.device_mover import move_batch
from trainer.data.nested import leaves
from trainer.data.sampler import MicroBatch
from trainer.errors import JobError
from trainer.parallel import messages
from trainer.parallel.base import DeferredScalar
from trainer.parallel.group import Group, gradients_of
from trainer.parallel.messages import coalesced
from trainer.parallel.modes import cut
from trainer.parallel.module_state import is_dense
from trainer.parallel.returned import check_count, read_losses, read_metrics
from trainer.parallel.stages import Stage, cut_model, keep_stage, sizes_of, unique
from trainer.parallel.step import Step
from trainer.task import Task
from trainer.wiring.rank import RankWiring

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class Pipeline(Group):
    """One stage of one pipeline."""

    warms_up = True
    cuts_model = True
    has_whole_state = False

    def __init__(self, job: Job, wiring: RankWiring, supervised: bool) -> None:
        super().__init__(job, wiring, supervised)
        assert job.pipeline.stages and job.pipeline.microbatches
        self.stages, self.micros = job.pipeline.stages, job.pipeline.microbatches
        self.part, self.stage = divmod(self.rank, self.stages)
        self.parts = self.world_size // self.stages
        self.speaks = self.stage == 0
        self.least_samples = job.train.batch_size // (self.parts * job.train.accumulate)
        self.size = self.least_samples // self.micros
        """Samples of a micro-batch of a pipeline, of which those of a step's end may not count."""
        self.is_last = self.stage == self.stages - 1
        self.neighbours = self._new_groups([range(first, first + self.stages) for first in self._firsts()])
        self.peers = self._new_groups([range(stage, self.world_size, self.stages) for stage in range(self.stages)])
        self.chunks: list[tuple[Any, int]] = []
        """The micro-batches of this step, each with how many of its samples count."""
        self.weight = 0.0
        self.schedule: Any = None

    def _firsts(self) -> range:
        """The first rank of each pipeline."""
        return range(0, self.world_size, self.stages)

    def _new_groups(self, every: Sequence[Sequence[int]]) -> Any:
        """That of some groups of ranks which has this rank; all ranks make all groups."""
        groups = [dist.new_group(list(ranks), timeout=self.timeout) for ranks in every]
        return next((group for group, ranks in zip(groups, every, strict=True) if self.rank in ranks), None)

    def build(self, task: Task, seed: Callable[[], None]) -> tuple[nn.Module, torch.device]:
        """The whole model on the CPU, of which the device gets a stage."""
        return super().build(task, seed)[0], torch.device("cpu")

    def wrap(self, step: Step) -> None:
        super().wrap(step)
        found = cut_model(step.task, step.model, self.stages)
        self.module = self.stage_module = Stage(
            found.stages[self.stage], self.stage == 0, self.is_last, step.autocast
        ).to(self.device)  # fmt: skip
        own = unique(found.stages[self.stage])
        self.ties: list[tuple[list[nn.Parameter], Any]] = []
        """Weights that other stages use too, with the group of their ranks."""
        self.counted = own
        """Those whose gradients are part of the norm: of ties, the first stage's."""
        for users, weights in found.shared.items():
            group = self._new_groups([[first + user for user in users] for first in self._firsts()])
            if self.stage in users:
                self.ties.append((weights, group))
            if self.stage in users[1:]:
                tied = set(map(id, weights))
                self.counted = [weight for weight in self.counted if id(weight) not in tied]
        shared = {id(weight) for weights, _ in self.ties for weight in weights}
        self.alone = [weight for weight in own if id(weight) not in shared and weight.requires_grad]
        keep_stage(step.model, found.stages[self.stage])

    def warm_up(self, batch: Any, count: int) -> None:
        """Find out what stages give each other: torch would ask them by pickles."""
        chunk = cut(batch, slice(0, self.size), count, "pipeline")
        with torch.no_grad():
            taken, given, _ = self._forward(chunk)
        self.stage_module.sizes = sizes_of(given)
        example = (torch.zeros(1, dtype=torch.int64, device=self.device),) if self.stage == 0 else taken
        result = (torch.zeros(1, device=self.device),) if self.is_last else given
        stage = PipelineStage(
            self.stage_module, self.stage, self.stages, self.device, example, result, group=self.neighbours
        )  # fmt: skip
        loss = self._loss_of if self.is_last else (lambda output, target: output)
        self.schedule = SCHEDULES[self.job.pipeline.schedule](stage, self.micros, loss, scale_grads=False)

    def _forward(self, batch: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Any]:
        """All stages compute a batch, one after the other: what this one takes and hands on, or makes if it is last."""
        taken: tuple[Tensor, ...] = (torch.zeros(1, dtype=torch.int64),)
        if self.stage:
            received = messages.receive(self.rank - 1)
            taken = tuple(tensor.to(self.device).requires_grad_() for tensor in received)
        else:
            self.stage_module.inputs = [self.step.task.inputs(batch)]
        made = self.stage_module(*taken)
        if self.is_last:
            return taken, (), made
        row = (made,) if isinstance(made, Tensor) else made
        if not (isinstance(row, tuple) and all(isinstance(each, Tensor) and each.is_floating_point() for each in row)):
            problem = "must be a tensor, or a tuple of them, of floating point numbers"
            raise JobError("task.stages", f"what stage {self.stage} returns", problem, "Cut the model elsewhere")
        messages.send([each.detach() for each in row], self.rank + 1)
        return taken, tuple(each.detach().requires_grad_() for each in row), None

    def compute(self, batch: Any, count: int, evaluate: bool = False) -> Any:
        """Computed by the last stage, and told to the others of its pipeline."""
        output = self._forward(batch)[2]
        first = self.part * self.stages
        if not self.is_last:
            values = messages.receive(first + self.stages - 1)
            losses = values["loss"] = values["loss"].requires_grad_(values.pop("\0learns"))
            return move_batch(values if evaluate else losses, self.device)
        try:
            with self.step.autocast():
                losses = read_losses(self.step.task.loss(output, batch))
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            problem = "the loss takes a derivative by the model's input, which the last stage does not have"
            raise JobError("parallel", "pipeline", problem, "Use parallel=ddp") from error
        values = {"loss": losses}
        if evaluate:
            per_sample = count if losses.dim() == 1 else None
            with self.step.autocast():
                metrics = self.step.task.metrics(output, batch)
            values |= read_metrics(metrics, per_sample, losses.device)
        for rank in range(first, self.rank):
            messages.send({**values, "\0learns": losses.requires_grad}, rank)
        return values if evaluate else losses

    def learn(self, batch: Any, micro: MicroBatch, scaler: torch.amp.GradScaler | None) -> None:
        places = [slice(number * self.size, (number + 1) * self.size) for number in range(self.micros)]
        self.chunks = [
            (cut(batch, place, len(micro.indices), "pipeline"), min(max(0, micro.count - place.start), self.size))
            for place in places
        ]
        self.weight = self.parts / micro.step_count
        numbers = torch.arange(self.micros, device=self.device)
        self.stage_module.scheduled = True
        try:
            if self.stage == 0:
                self.stage_module.inputs = [self.step.task.inputs(chunk) for chunk, _ in self.chunks]
                self.schedule.step(numbers)
            elif self.is_last:
                self.schedule.step(target=numbers)
            else:
                self.schedule.step()
        except RuntimeError as error:
            if isinstance(error.__cause__, JobError):  # torch wraps what a stage raises
                raise error.__cause__ from None
            raise
        self.stage_module.scheduled = False

    def _loss_of(self, given: Tensor, number: Tensor) -> Tensor:
        """This part of the global mean loss; samples that do not count are cut off before the task sees them."""
        batch, count = self.chunks[int(number)]
        output, self.stage_module.made = self.stage_module.made, None
        if count == 0:
            return torch.stack([each.sum() for each in leaves(output)]).sum() * 0
        if count < self.size:
            batch, output = (cut(each, slice(0, count), self.size, "pipeline") for each in (batch, output))
        with self.step.autocast():
            losses = read_losses(self.step.task.loss(output, batch))
        check_count(losses, count)
        total = losses.sum(0) * self.weight
        if losses.dim() > 1:
            counted, total = total[1].detach(), total[0]
            self._count = counted if self._count is None else self._count + counted
        self._loss = total.detach() if self._loss is None else self._loss + total.detach()
        return total

    def agree(self, due: bool) -> DeferredScalar | float:
        """Loss and counts come from the last stages, whether or not a step has any there."""
        nothing = torch.zeros((), dtype=torch.float64, device=self.device)
        pairs = (self._loss, self._count)
        ballot = torch.stack([nothing if each is None else each.double() for each in pairs])
        counts = torch.tensor([float(self._count is not None)], device=self.device)
        ballot = torch.cat((ballot, counts.double()))
        dist.all_reduce(ballot)
        ballot[:2] /= self.parts
        for weights, group in self.ties:
            self._add_up(weights, group, 1)
        for weights in (self.alone, *(weights for weights, _ in self.ties)):
            if self.parts > 1:
                self._add_up(weights, self.peers, self.parts)
        loss = ballot[0] if not ballot[2] else self._divide(*ballot[:2])
        self._loss, self._count, self.chunks, self.stage_module.inputs = None, None, [], []
        return DeferredScalar(loss) if self.cuda else loss.item()

    def _add_up(self, weights: Sequence[nn.Parameter], group: Any, parts: int) -> None:
        """Ties have rows of their own: the place of a number in its row decides in which order its values are added."""
        gradients = gradients_of(weights)
        coalesced(lambda flat: dist.all_reduce(flat, group=group), gradients)
        for weight, gradient in zip(weights, gradients, strict=True):
            if weight.grad is not None or bool(gradient.any()):
                weight.grad = gradient / parts

    def clip(self, parameters: Sequence[Tensor], norm: float) -> None:
        """By the norm over all stages."""
        own = [weight.grad for weight in self.counted if weight.grad is not None]
        square = torch.nn.utils.get_total_norm(own).to(self.device, torch.float64) ** 2
        dist.all_reduce(square, group=self.neighbours)
        here = [weight for weight in parameters if weight.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(here, norm, square.sqrt())

    def share_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Those of a stage, among the pipelines."""
        buffers = [buffer for buffer in self.stage_module.buffers() if is_dense(buffer)]
        send = partial(dist.broadcast, src=self.stage, group=self.peers)
        coalesced(lambda flat: send(flat.view(torch.uint8)), buffers)

    def differing_weights(self) -> list[str]:
        return []

    def whole_state(self, weights: dict[str, Any], objects: dict[str, Any]) -> None:
        """Rank 0 gets what the other stages of its pipeline have, in the memory of its CPU."""
        if self.part:
            return
        if self.rank:
            messages.send(self._own_state(weights, objects), 0)
            return
        model, states = objects["model"], self._own_states(objects)
        for rank in range(1, self.stages):
            found = messages.receive(rank)
            weights |= found["weights"]
            model["buffers"]["others"] |= found["others"]
            model["numbers"] |= found["numbers"]
            states |= {int(number): state for number, state in found["optimizer"].items()}
        objects["optimizer"]["state"]["state"] = dict(sorted(states.items()))

    def _own_state(self, weights: dict[str, Any], objects: dict[str, Any]) -> dict[str, Any]:
        """What this stage has, as JSON can say it."""
        model, states = objects["model"], self._own_states(objects)
        return {
            "weights": real(weights), "others": real(model["buffers"]["others"]), "numbers": model["numbers"],
            "optimizer": {str(number): state for number, state in states.items()},
        }  # fmt: skip

    def _own_states(self, objects: dict[str, Any]) -> dict[int, Any]:
        """The optimizer's, of this stage's weights, by their numbers among those of the whole model."""
        every = (weight for group in self.optimizer.param_groups for weight in group["params"])
        states = objects["optimizer"]["state"]["state"]
        return {n: states[n] for n, weight in enumerate(every) if n in states and not weight.is_meta}


def real(named: dict[str, Any]) -> dict[str, Any]:
    """Those that are not on the meta device."""
    return {name: value for name, value in named.items() if not (isinstance(value, Tensor) and value.is_meta)}
