"""DistributedDataParallel: how the ranks of a process group compute one step together, and agree."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from trainer.config.job import Ddp
from trainer.errors import JobError, some_of
from trainer.parallel.base import DeferredScalar
from trainer.parallel.fast_path import run_backward
from trainer.parallel.group import Group
from trainer.parallel.messages import broadcast, coalesced
from trainer.parallel.module_state import is_dense
from trainer.parallel.step import Step

HALF = ("bf16", "fp16")
"""These exchange gradients in 16 bits."""
UNSHARED = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that gloo does not know."""


class VotingStep(Step):
    """A step with a parameter of two elements, whose gradient carries what the ranks tell each other.

    DDP averages it in a bucket with other gradients: the mean of (loss, count) needs no collective of its own, which
    would cost 0.3 ms of CPU time a step with gloo.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        super().__init__(step.model, step.task, step.autocast)
        self.apply_model = step.apply_model
        # All gradients of a bucket have the same type; but 16 bits would lose a loss's digits.
        exact = any(value.dtype == torch.float64 for value in step.parameters() if value.requires_grad)
        self.vote = nn.Parameter(torch.zeros(2, device=device, dtype=torch.float64 if exact else torch.float32))

    def forward(self, batch: Any, evaluate: bool = False) -> tuple[Any, Tensor]:
        """Losses and the vote. DDP must find it among the outputs to know that it is used."""
        return super().forward(batch, evaluate), self.vote.view_as(self.vote)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Those that DDP can share. Sparse ones, such as adjacency matrices, are constant, and equal from the start."""
        every = super().named_buffers(prefix, recurse, remove_duplicate)
        return ((name, buffer) for name, buffer in every if is_dense(buffer) and buffer.dtype not in UNSHARED)


class Distributed(Group):
    """DistributedDataParallel: one process for each device."""

    def wrap(self, step: Step) -> None:
        options = self.job.ddp
        if options.sync_batchnorm:
            if not self.cuda:
                raise JobError("ddp.sync_batchnorm", True, "torch implements it for GPUs only", "Remove it")
            step.model = nn.SyncBatchNorm.convert_sync_batchnorm(step.model)
        if not self.cuda and any(isinstance(part, nn.SyncBatchNorm) for part in step.model.modules()):
            remedy = "Use BatchNorm, and set ddp.sync_batchnorm=true where there are GPUs"
            raise JobError("task.model", "SyncBatchNorm", "torch implements it for GPUs only", remedy)
        super().wrap(step)
        voting = VotingStep(step, self.device)
        self.vote = voting.vote
        self.ddp = DistributedDataParallel(
            voting, device_ids=[self.device] if self.cuda else None, bucket_cap_mb=options.bucket_mb,
            gradient_as_bucket_view=True, static_graph=options.static_graph,
            find_unused_parameters=options.find_unused_parameters,
        )  # fmt: skip
        add_comm_hook(self.ddp, options)
        self.warms_up = self.world_size > 2 or options.compression != "none"

    def warm_up(self, batch: Any, count: int) -> None:
        """Let DDP choose its gradient buckets.

        It reorders them after its first step. With more than two ranks the place of an element in its bucket decides
        in which order the ranks' values are added, so the last bits of the first step after a resume would differ.
        """
        self.backward(self.losses(batch, count), 0.0, None)
        self._check_unused()
        self._forget()

    def losses(self, batch: Any, count: int, last: bool = True) -> Tensor:
        """Gradients are averaged with the last micro-batch, but not under post-local SGD after its start."""
        averages = last and not self._local()
        if self.ddp.require_backward_grad_sync != averages:  # a module's attributes are slow to set
            self.ddp.require_backward_grad_sync = averages
        losses: Tensor
        losses, self._vote_output = self.ddp(batch)
        return losses

    def _backward(self, losses: Tensor, gradient: Tensor) -> None:
        """The vote goes along where gradients are averaged."""
        if self.ddp.require_backward_grad_sync:
            ballot = self._ballot()
            if ballot.dtype is not self.vote.dtype:
                ballot = ballot.to(self.vote.dtype)
            try:
                run_backward((losses, self._vote_output), (gradient, ballot))
            except RuntimeError as error:
                if "ready only once" not in str(error):
                    raise
                problem = "DDP met a weight twice in one backward pass, such as through checkpoint(use_reentrant=True)"
                remedy = "Use checkpoint(..., use_reentrant=False), or set it to false and ddp.static_graph=true"
                key, value = "ddp.find_unused_parameters", self.job.ddp.find_unused_parameters
                raise JobError(key, value, problem, remedy) from error
        else:
            super()._backward(losses, gradient)

    def _forget(self) -> None:
        """Begin a new step."""
        self._loss, self._count, self.vote.grad = None, None, None

    def agree(self, due: bool) -> DeferredScalar | float:
        """The mean loss over ranks. Without a vote in the gradients this is a collective.

        A step of post-local SGD after which ranks may differ tells this rank's own loss.
        """
        if not self._local():
            self._check_unused()
        ballot = self.vote.grad
        if ballot is None or self.job.ddp.compression in HALF:  # 16 bits would lose its digits, or overflow
            ballot = self._ballot()
            if self._averages(due):
                self._average(ballot)
        loss = ballot[0] if self._count is None else self._divide(*ballot)
        self._forget()
        return DeferredScalar(loss) if self.cuda else loss.item()

    def _check_unused(self) -> None:
        """Name the parameters that DDP waits for in vain: their bucket, and all after it, were not averaged.

        DDP itself notices it in the next step, after an update that makes the ranks differ; only the reducer's
        private method tells before.
        """
        try:
            self.ddp.reducer._check_reducer_finalized()
        except RuntimeError:
            parameters = self.step.model.named_parameters()
            unused = [name for name, value in parameters if value.requires_grad and value.grad is None]
            names = some_of(unused, 8) or "parameters in the last micro-batch that an earlier one used"
            problem = f"the loss does not use {names}"
            remedy = "Set it to true, use them in the forward pass, or set requires_grad=False on them"
            raise JobError("ddp.find_unused_parameters", False, problem, remedy) from None

    def finish_step(self, optimizer: torch.optim.Optimizer, due: bool) -> bool:
        """Under post-local SGD, average weights and optimizer state when that is due.

        Averaging the momenta too (Yu et al. 2019, arXiv 1905.03817) makes the ranks equal, so a checkpoint is whole.
        """
        averages = self._averages(due)
        if averages and self._local():
            weights = list(self.step.model.parameters())
            coalesced(self._average, [weight.data for weight in weights if weight.requires_grad])
            coalesced(broadcast, [weight.data for weight in weights if not weight.requires_grad])  # a mean rounds
            states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim()]
            coalesced(self._average, states)
            self.share_buffers([self.step.model])
        self.steps += 1
        return averages

    def _local(self) -> bool:
        """Whether the ranks keep the gradients of the current step to themselves."""
        return self.job.ddp.sync_every > 1 and self.steps >= self.job.ddp.sync_start

    def _averages(self, due: bool) -> bool:
        """Whether all ranks are equal when the current step ends."""
        every, start = self.job.ddp.sync_every, self.job.ddp.sync_start
        return due or not self._local() or (self.steps + 1 - start) % every == 0


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
