"""DistributedDataParallel: how the ranks of a process group compute one step together, and agree."""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from trainer.config.job import Ddp, Job
from trainer.errors import JobError
from trainer.parallel import messages
from trainer.parallel.base import DeferredScalar, Parallel
from trainer.parallel.fast_path import run_backward
from trainer.parallel.means import mean_over_ranks
from trainer.parallel.messages import broadcast, coalesced
from trainer.parallel.module_state import is_dense
from trainer.parallel.patience import TIMES, Patience
from trainer.parallel.step import Step
from trainer.wiring.rank import RankWiring

SUPERVISED = timedelta(days=7)
"""For collectives that an agent watches over: as good as no limit."""
HALF = ("bf16", "fp16")
"""These exchange gradients in 16 bits."""

UNSHARED = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that gloo does not know."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By their bytes; for others those of 8."""


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


class Distributed(Parallel):
    """DistributedDataParallel: one process for each device."""

    def __init__(self, job: Job, wiring: RankWiring, supervised: bool) -> None:
        """Join the process group: NCCL for GPUs (with gloo for CPU tensors), else gloo.

        `supervised`: an agent watches heartbeats. It notices and names a hang, so no collective ever gives up: those
        of a job that was suspended would, as soon as it goes on.
        """
        super().__init__(job, wiring)
        backend = "cpu:gloo,cuda:nccl" if self.cuda else "gloo"
        timeout = SUPERVISED if supervised else timedelta(seconds=job.agent.hang_timeout_s)
        if not dist.is_initialized():  # a script may have joined it
            dist.init_process_group(backend, timeout=timeout, device_id=self.device if self.cuda else None)
        self.saving_s = 2 * TIMES * job.agent.hang_timeout_s
        self.starting = self.saving = None
        if not supervised:
            limits = job.agent.start_timeout_s, self.saving_s + job.agent.hang_timeout_s
            self.starting, self.saving = (dist.new_group(timeout=timedelta(seconds=s), backend="gloo") for s in limits)

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
        self._no_count = torch.zeros((), device=self.device, dtype=torch.float32)
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

    def _ballot(self) -> Tensor:
        """What this rank tells the others, shape (2,): its part of the loss, and its count."""
        assert self._loss is not None
        return torch.stack((self._loss, self._no_count if self._count is None else self._count))

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
            names = ", ".join(unused[:8]) or "parameters in the last micro-batch that an earlier one used"
            more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
            problem = f"the loss does not use {names}{more}"
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

    def _average(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)
        tensor /= self.world_size

    def _local(self) -> bool:
        """Whether the ranks keep the gradients of the current step to themselves."""
        return self.job.ddp.sync_every > 1 and self.steps >= self.job.ddp.sync_start

    def _averages(self, due: bool) -> bool:
        """Whether all ranks are equal when the current step ends."""
        every, start = self.job.ddp.sync_every, self.job.ddp.sync_start
        return due or not self._local() or (self.steps + 1 - start) % every == 0

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
