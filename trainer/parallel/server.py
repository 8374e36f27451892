"""The parameter server: rank 0 gets gradients from all others, updates, and sends them the weights.

What the tutorials describe, to measure it. It moves as much as an all-reduce does, but all of it through one rank.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config.job import Job
from trainer.data.sampler import MicroBatch
from trainer.errors import JobError
from trainer.parallel.base import DeferredScalar
from trainer.parallel.group import Group, gradients_of
from trainer.parallel.messages import broadcast, bytes_of, coalesced
from trainer.parallel.module_state import is_dense
from trainer.parallel.step import Step
from trainer.wiring.rank import RankWiring

HEAD = 3
"""Numbers before the gradients or weights in a message, of 8 bytes each."""


def make_server(job: Job, wiring: RankWiring, supervised: bool) -> Group:
    """The server that the job asks for."""
    return (Server if job.server.synchronous else AsynchronousServer)(job, wiring, supervised)


class Server(Group):
    """All ranks compute, and none goes on before rank 0 has updated: the losses are those of a single process."""

    def __init__(self, job: Job, wiring: RankWiring, supervised: bool) -> None:
        super().__init__(job, wiring, supervised)
        self.has_whole_state = self.rank == 0

    def agree(self, due: bool) -> DeferredScalar | float:
        weights = trained(self.step)
        gradients = gradients_of(weights)
        coalesced(self._gather_mean, gradients)
        for weight, gradient in zip(weights, gradients, strict=True):
            if weight.grad is not None or bool(gradient.any()):  # else no rank uses it: no update may touch it
                weight.grad = gradient
        return super().agree(due)

    def _gather_mean(self, flat: Tensor) -> None:
        """Rank 0's become the mean of all; the others keep theirs."""
        if self.rank:
            dist.gather(flat)
            return
        every = [torch.empty_like(flat) for _ in range(self.world_size)]
        dist.gather(flat, every)
        flat.copy_(torch.stack(every).mean(0))

    def update(self) -> None:
        if self.rank == 0:
            self.apply()
        coalesced(self._send, [*map(Tensor.detach, trained(self.step)), *filter(is_dense, self.step.model.buffers())])

    def _send(self, flat: Tensor) -> None:
        """Give all what rank 0 has, each directly from it: a broadcast would be a tree."""
        data = flat.view(torch.uint8)
        dist.scatter(data, [data] * self.world_size if self.rank == 0 else None)


class AsynchronousServer(Group):
    """Rank 0 only serves; the others compute, each at its own pace, until all meet where something is due.

    A message is a row of bytes on the CPU: what its sender says, then weights, or which of them have
    gradients, and those.
    """

    irreproducible = "with server.synchronous=false, gradients count in the order in which they arrive"
    stops_anywhere = True  # there, rank 0 has served all of their steps, and none that comes after

    def __init__(self, job: Job, wiring: RankWiring, supervised: bool) -> None:
        super().__init__(job, wiring, supervised)
        self.part, self.parts = self.rank - 1, self.world_size - 1
        self.updates = self.parts
        self.has_whole_state = self.rank == 0
        self.version = 0
        """How many updates the weights of this rank have seen since the ranks started."""
        self.samples = 0
        """That count in this step, on this rank."""
        self.staleness: list[int] = []
        """Of the updates since it was last recorded: how many others came after their weights were sent."""
        self.arrived: list[deque[float]] = [deque() for _ in range(self.parts)]
        """The losses that the others have sent, of steps that rank 0 has not counted yet."""

    def wrap(self, step: Step) -> None:
        for name, part in step.model.named_modules():
            if getattr(part, "running_mean", None) is not None:
                problem = f"rank 0 computes nothing, so it would not learn the statistics of {name or 'the model'}"
                raise JobError("server.synchronous", False, problem, "Use true, or GroupNorm instead of batch norms")
        super().wrap(step)

    def learn(self, batch: Any, micro: MicroBatch, scaler: torch.amp.GradScaler | None) -> None:
        if self.rank:
            self.samples += micro.count
            super().learn(batch, micro, scaler)

    def agree(self, due: bool) -> float:
        """Push gradients and pull weights; rank 0 does that for all others, until each has come as far as itself."""
        if self.rank == 0:
            while not all(self.arrived):
                self._serve()
            return sum(losses.popleft() for losses in self.arrived) / self.parts
        assert self._loss is not None
        loss = float(self._loss if self._count is None else self._divide(self._loss, self._count))
        weights = trained(self.step)
        used = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.bool, device="cpu")
        dist.send(pack([self.version, self.samples, loss], [used, *gradients_of(weights)]), 0)
        self._loss, self._count, self.samples = None, None, 0
        message = pack([0, 0, 0], weights)
        dist.recv(message, 0)
        (version, *_), values = unpack(message, weights)
        self.version = int(version)
        for weight, value in zip(weights, values, strict=True):
            weight.detach().copy_(value)
        return loss

    def _serve(self) -> None:
        """One update, from whoever comes next, who gets the weights after it."""
        weights = trained(self.step)
        like = [torch.zeros(len(weights), dtype=torch.bool, device="cpu"), *weights]
        message = pack([0, 0, 0], like)
        source = dist.recv(message)
        (version, samples, loss), (used, *gradients) = unpack(message, like)
        self.arrived[source - 1].append(loss)
        if samples and math.isfinite(loss):
            for weight, gradient, is_used in zip(weights, gradients, used.tolist(), strict=True):
                weight.grad = gradient.to(weight.device) if is_used else None  # else no update may touch it
            self.apply()
            self.staleness.append(self.version - int(version))
            self.version += 1
        dist.send(pack([self.version, 0, 0], weights), source)

    def update(self) -> None:
        """That is done."""

    def measurements(self) -> dict[str, float]:
        staleness, self.staleness = self.staleness, []
        if not staleness:
            return {}
        return {"staleness": sum(staleness) / len(staleness), "staleness_max": max(staleness)}

    def finish_step(self, optimizer: torch.optim.Optimizer, due: bool) -> bool:
        if due:
            coalesced(broadcast, list(map(Tensor.detach, trained(self.step))))
            self.version = self.share(self.version)
        return due


def trained(step: Step) -> list[Tensor]:
    """The weights that are trained."""
    return [weight for weight in step.model.parameters() if weight.requires_grad]


def pack(head: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """A message: the bytes of `HEAD` numbers and of the tensors."""
    numbers = torch.tensor(head, dtype=torch.float64, device="cpu")
    return torch.cat([bytes_of(tensor.detach().cpu()) for tensor in (numbers, *tensors)])


def unpack(message: Tensor, like: Sequence[Tensor]) -> tuple[list[float], list[Tensor]]:
    """What is in a message: the numbers, and tensors like those that are given."""
    head, *parts = message.split([8 * HEAD, *(tensor.nbytes for tensor in like)])
    pairs = zip(parts, like, strict=True)
    return head.view(torch.float64).tolist(), [part.clone().view(t.dtype).view(t.shape) for part, t in pairs]
