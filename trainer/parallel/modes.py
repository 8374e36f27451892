"""The modes: single, DataParallel and DistributedDataParallel behind one small interface.

What differs between them is how a step's module is wrapped and how ranks agree; the loop knows neither.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.config.job import Job
from trainer.parallel.cpu_replicas import ThreadReplicas
from trainer.parallel.step import Step
from trainer.wiring.devices import use_cuda
from trainer.wiring.rank import RankWiring

NOTHING = nullcontext()


class Late:
    """Numbers on their way from a GPU: to read them waits for what was queued before, not for what was queued since.

    `Tensor.item()` waits for all that is queued; a step later that is the next step's forward and backward pass.
    """

    def __init__(self, values: Tensor) -> None:
        """`values`: of shape (n,), the first of which is a loss."""
        self.values = values.to("cpu", non_blocking=True)  # torch takes page-locked memory for such a copy
        self.copied = torch.cuda.Event()
        self.copied.record()

    def read(self) -> list[float]:
        """The numbers."""
        self.copied.synchronize()
        numbers: list[float] = self.values.tolist()
        return numbers

    def __float__(self) -> float:
        """The loss."""
        return self.read()[0]


class Weights(NamedTuple):
    """Constants of a batch of n samples that each count `weight`."""

    gradient: Tensor
    """Of the sum, shape (n,): known, so autograd need not find it."""
    answers: tuple[Tensor, ...]
    """(loss, 0) and (loss, 1): what a rank says that was not asked to stop, or was."""
    losses: tuple[Tensor, ...]
    """Where to write the loss in each of these."""


def scaled(gradient: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """The gradient to begin with under fp16's loss scaling."""
    return gradient if scaler is None else scaler.scale(gradient)


def run_backward(outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """`torch.autograd.backward` of tensors with gradients that fit, which its engine makes sure of anyway.

    Around the engine it compares symbolic shapes in Python: 20 microseconds, or 100 after a wait for other ranks.
    """
    if run_engine is None or type(outputs[0]) is not Tensor:  # a subclass may have its own way
        torch.autograd.backward(outputs, gradients)
    else:
        run_engine(outputs, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)


run_engine: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)


class Parallel:
    """One process: single, or DataParallel over several devices of this node."""

    def __init__(self, job: Job, wiring: RankWiring) -> None:
        """Choose the devices of this rank."""
        self.job = job
        self._weights: dict[tuple[int, float], Weights] = {}
        self.rank, self.world_size = wiring.rank, wiring.world_size
        self.local_rank, self.restarts = wiring.local_rank, wiring.restarts
        self.cuda = use_cuda(job)
        self.device = torch.device("cpu")
        if self.cuda:
            self.device = torch.device("cuda", self.local_rank if torch.cuda.device_count() > 1 else 0)
            torch.cuda.set_device(self.device)
        self.devices = [self.device]
        """All that this rank computes on; the first is where results are."""
        if self.cuda and job.parallel == "dp":
            self.devices = [torch.device("cuda", index) for index in range(job.devices_per_node)]

    def wrap(self, step: Step) -> None:
        """Wrap the module that computes a step's losses; call once, before any step."""
        self.step = step
        self.module: nn.Module = step
        if self.job.parallel == "dp":
            count = self.job.devices_per_node
            self.module = nn.DataParallel(step, self.devices) if self.cuda else ThreadReplicas(step, count)

    warms_up = False
    """Whether `warm_up` must be called, with any batch, before the first step."""

    def warm_up(self, batch: Any) -> None:
        """Arrange what only a step can arrange."""

    def losses(self, batch: Any) -> Tensor:
        """Per-sample losses of this rank's batch, on the primary device."""
        losses: Tensor = self.module(batch)
        return losses

    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Per-sample losses and metrics of a batch that this rank alone computes."""
        result: dict[str, Tensor] = self.module(batch, True)
        return result

    def backward(self, losses: Tensor, weight: float, scaler: torch.amp.GradScaler | None, stop: bool) -> None:
        """Accumulate gradients of the sum of `losses` times `weight`, and what the ranks must agree on.

        That product is this rank's part of the global mean loss; `stop`: whether this rank was asked to stop.
        """
        weights = self.weights(losses, weight)
        loss = torch.dot(losses.detach(), weights.gradient)
        self._loss = loss if self._loss is None else self._loss + loss
        self._stop = self._stop or stop
        run_backward((losses,), (scaled(weights.gradient, scaler),))

    def weights(self, losses: Tensor, weight: float) -> Weights:
        """What turns `losses` into their sum times `weight`; made once for each."""
        key = losses.shape[0], weight
        if key not in self._weights:
            answers = losses.new_tensor([[0, 0], [0, 1]], requires_grad=False)
            self._weights[key] = Weights(
                torch.full_like(losses, weight, requires_grad=False), answers.unbind(), answers[:, 0].unbind()
            )  # fmt: skip
        return self._weights[key]

    _loss: Tensor | None = None
    _stop = False
    steps = 0

    def agree(self, due: bool) -> tuple[Late | float, bool]:
        """The global mean loss of the step and whether any rank was asked to stop; forgets both.

        With ranks on GPUs the stop is that of the step before: nobody waits for a GPU to know it.

        `due`: the step ends an epoch, or an evaluation or a checkpoint follows it.
        """
        loss, stop = self._loss, self._stop
        assert loss is not None
        self._loss, self._stop = None, False
        return Late(loss.view(1)) if self.cuda else loss.item(), stop

    def accumulating(self, more: bool) -> AbstractContextManager[None]:
        """Surround forward and backward; `more`: further micro-batches follow before the update."""
        return NOTHING

    def finish_step(self, optimizer: torch.optim.Optimizer, due: bool) -> bool:
        """Do what the mode does after an update; return whether all ranks hold the same weights now."""
        return True

    def share_buffers(self) -> None:
        """Give all ranks the buffers of rank 0's model, such as batch statistics: those that a checkpoint holds."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def gather_objects(self, value: Any) -> list[Any]:
        """Small picklable values of all ranks."""
        return [value]

    def share(self, value: Any, source: int = 0) -> Any:
        """The value of rank `source`, on all ranks."""
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Leave the group."""


def make_parallel(job: Job, wiring: RankWiring, supervised: bool) -> Parallel:
    """The mode that the job asks for, joined."""
    if job.parallel == "ddp":
        from trainer.parallel.ddp import Distributed

        return Distributed(job, wiring, supervised)
    return Parallel(job, wiring)
