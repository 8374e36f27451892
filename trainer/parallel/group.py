"""Ranks in a process group: how they meet, tell each other values, and leave. Modes of several ranks build on it."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config.job import Job
from trainer.parallel import messages
from trainer.parallel.base import DeferredScalar, Parallel
from trainer.parallel.means import mean_over_ranks
from trainer.parallel.messages import broadcast, coalesced
from trainer.parallel.module_state import is_dense
from trainer.parallel.patience import TIMES, Patience
from trainer.parallel.step import Step
from trainer.wiring.rank import RankWiring

SUPERVISED = timedelta(days=7)
"""For collectives that an agent watches over: as good as no limit."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By their bytes; for others those of 8."""


class Group(Parallel):
    """One process for each device, all in one process group."""

    def __init__(self, job: Job, wiring: RankWiring, supervised: bool) -> None:
        """Join the process group: NCCL for GPUs (with gloo for CPU tensors), else gloo.

        `supervised`: an agent watches heartbeats. It notices and names a hang, so no collective ever gives up: those
        of a job that was suspended would, as soon as it goes on.
        """
        super().__init__(job, wiring)
        backend = "cpu:gloo,cuda:nccl" if self.cuda else "gloo"
        self.timeout = timeout = SUPERVISED if supervised else timedelta(seconds=job.agent.hang_timeout_s)
        if not dist.is_initialized():  # a script may have joined it
            dist.init_process_group(backend, timeout=timeout, device_id=self.device if self.cuda else None)
        self.saving_s = 2 * TIMES * job.agent.hang_timeout_s
        self.starting = self.saving = None
        if not supervised:
            limits = job.agent.start_timeout_s, self.saving_s + job.agent.hang_timeout_s
            self.starting, self.saving = (dist.new_group(timeout=timedelta(seconds=s), backend="gloo") for s in limits)

    def wrap(self, step: Step) -> None:
        super().wrap(step)
        self._no_count = torch.zeros((), device=self.device, dtype=torch.float32)

    def agree(self, due: bool) -> DeferredScalar | float:
        ballot = self._ballot()
        self._average(ballot)
        loss = ballot[0] if self._count is None else self._divide(*ballot)
        self._loss, self._count = None, None
        return DeferredScalar(loss) if self.cuda else loss.item()

    def _ballot(self) -> Tensor:
        """What this rank tells the others, shape (2,): its part of the loss, and its count."""
        assert self._loss is not None
        return torch.stack((self._loss, self._no_count if self._count is None else self._count))

    def _average(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)
        tensor /= self.world_size

    def share_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Give all ranks rank 0's buffers. DDP does that before a forward pass of training only."""
        buffers = (buffer for module in modules for buffer in module.buffers() if is_dense(buffer))
        coalesced(broadcast, list(buffers))

    def differing_weights(self) -> list[str]:
        named = [(name, weight.detach()) for name, weight in self.step.model.named_parameters() if is_dense(weight)]
        # Bits as whole numbers: their sum is the same in any order, on any processor.
        bits = (weight.reshape(-1).view(INTEGERS.get(weight.itemsize, torch.int64)) for _, weight in named)
        sums = [int(part.sum(dtype=torch.int64)) for part in bits]
        least = torch.tensor(sums, dtype=torch.int64, device="cpu")
        most = least.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return [name for (name, _), differs in zip(named, (least != most).tolist(), strict=True) if differs]

    def meet(self) -> None:
        """Wait for all ranks: before the first step longer than a collective would."""
        nothing = torch.zeros(1, dtype=torch.float32, device="cpu")  # whatever the user's defaults are
        dist.all_reduce(nothing, group=self.starting)

    def any(self, flag: bool, beat: Callable[[], None] | None = None) -> bool:
        tensor = torch.tensor([float(flag)], dtype=torch.float32, device="cpu")
        if beat is None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        else:
            work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.saving, async_op=True)
            Patience(self.saving_s, beat).watch(work.is_completed)
            work.wait()
        return bool(tensor.item())

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        return mean_over_ranks(values, self.world_size)

    def gather(self, value: Any) -> list[Any]:
        return messages.gather(value, self.world_size)

    def share(self, value: Any, source: int = 0) -> Any:
        return messages.share(value, self.rank, source)

    def hand_out(self, parts: Sequence[Tensor], source: int, beat: Callable[[], None]) -> None:
        messages.hand_out(parts, self.rank, source, self.device, beat)

    def close(self) -> None:
        """Wait for all ranks and destroy the process group.

        Its objects stay referenced: gloo's destructor joins a thread that may wait for the lock of the interpreter,
        which the destructor holds (torch 2.13: one end of ten with 4 ranks hung).
        """
        dist.barrier()
        _ended.append((self, dist.group.WORLD))
        dist.destroy_process_group()


_ended: list[Any] = []


def gradients_of(weights: Sequence[Tensor]) -> list[Tensor]:
    """One of each, dense; of a weight that the loss does not use it is zero."""
    return [torch.zeros_like(weight) if weight.grad is None else weight.grad.to_dense() for weight in weights]
