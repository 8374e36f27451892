"""DistributedDataParallel: how ranks of a process group compute one step together and agree.

The other modes, and the interface, are in `trainer.parallel.modes`.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config.job import Ddp, Job
from trainer.errors import JobError
from trainer.parallel.modes import NOTHING, Late, Parallel, run_backward, scaled
from trainer.parallel.step import Step
from trainer.wiring.rank import RankWiring


class Distributed(Parallel):
    """DistributedDataParallel: one process per device."""

    def __init__(self, job: Job, wiring: RankWiring, supervised: bool) -> None:
        """Join the process group: NCCL for GPUs (with gloo for CPU tensors), else gloo.

        `supervised`: an agent watches heartbeats; it shall notice a hang, and name it, before a collective gives up.
        """
        super().__init__(job, wiring)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.cuda else "gloo",
            timeout=timedelta(seconds=job.agent.hang_timeout_s + (60 if supervised else 0)),
            device_id=self.device if self.cuda else None,
        )

    def wrap(self, step: Step) -> None:
        """Wrap in DDP, with a small parameter whose gradient carries what the ranks must agree on.

        So the agreement costs no collective of its own: it travels in a gradient bucket.
        """
        options: Ddp = self.job.ddp
        if options.sync_batchnorm:
            if not self.cuda:
                raise JobError("ddp.sync_batchnorm", True, "torch implements it for GPUs only", "Remove it")
            step.model = nn.SyncBatchNorm.convert_sync_batchnorm(step.model)
        self.step = step
        dtype = next((p.dtype for p in step.model.parameters() if p.requires_grad), torch.float32)
        step.vote = self.vote = nn.Parameter(torch.zeros(2, device=self.device, dtype=dtype))
        step.shows_vote = options.find_unused_parameters  # DDP looks for those that are used in the outputs' graph
        self._voting: Tensor = self.vote
        self.module = self.ddp = DistributedDataParallel(
            step,
            device_ids=[self.device] if self.cuda else None,
            bucket_cap_mb=options.bucket_mb,
            gradient_as_bucket_view=True,
            static_graph=options.static_graph,
            find_unused_parameters=options.find_unused_parameters,
        )
        add_comm_hook(self.ddp, options)
        self.compressed = options.compression in ("bf16", "fp16")
        self.steps = 0  # done so far; set by the loop on a resume
        self._rarely = options.sync_every > 1
        self.warms_up = self.world_size > 2 or options.compression != "none"

    def warm_up(self, batch: Any) -> None:
        """Let DDP choose its gradient buckets, by a backward pass of zeros.

        It orders them anew after its first step. With more than two ranks an element's place in its bucket decides
        in which order the ranks' values are added, so the first step of a resumed run would differ in the last bits.
        """
        losses = self.losses(batch)
        ((losses.sum() + self._voting.sum()) * 0).backward()
        self._check_unused()
        self.vote.grad = None

    def losses(self, batch: Any) -> Tensor:
        """Per-sample losses of this rank's batch."""
        losses: Any = self.ddp(batch)
        if self.step.shows_vote:
            losses, self._voting = losses
        return losses  # type: ignore[no-any-return]

    _ballot: Tensor | None = None

    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Per-sample losses and metrics of a batch that this rank alone computes: without DDP's wrapper."""
        result: dict[str, Tensor] = self.step(batch, True)
        return result

    def backward(self, losses: Tensor, weight: float, scaler: torch.amp.GradScaler | None, stop: bool) -> None:
        """Accumulate gradients; the mean over ranks of `vote`'s gradient is (global loss, share that wants to stop)."""
        weights = self.weights(losses, weight)
        torch.dot(losses.detach(), weights.gradient, out=weights.losses[stop])
        # Without averaging, autograd takes the ballot itself as the gradient, to which others are added.
        ballot = weights.answers[stop].to(self.vote.dtype, copy=not self.ddp.require_backward_grad_sync)
        if self.compressed:  # it is counted apart: in the bucket it would lose its digits, or overflow
            self._ballot = ballot.clone() if self._ballot is None else self._ballot + ballot
        run_backward((losses, self._voting), (scaled(weights.gradient, scaler), ballot))

    _before: Late | None = None
    """The vote of the step before. Under post-local SGD, whose averages are rare, that of the step is waited for."""
    _stopping = False

    def agree(self, due: bool) -> tuple[Late | float, bool]:
        """Read the vote; its gradient has been averaged with the others."""
        local = self._rarely and self._local()
        if not local:
            self._check_unused()
        ballot: Any = self.vote.grad
        if self._ballot is not None or (local and self._averages(due)):
            ballot = ballot.clone() if self._ballot is None else self._ballot
            self._ballot = None
            dist.all_reduce(ballot)
            ballot /= self.world_size
        self.vote.grad = None
        if not self.cuda:
            loss, votes = ballot.tolist()
            return loss, votes > 0
        late = Late(ballot)
        asked, self._before = late if local else self._before, late
        if asked is not None and self._averages(due):
            self._stopping = self._stopping or asked.read()[1] > 0
        return late, self._stopping

    def _check_unused(self) -> None:
        """Name the parameters that DDP waits for in vain: their bucket, and all after it, were not averaged."""
        try:
            self.ddp.reducer._check_reducer_finalized()
        except RuntimeError as error:
            names = [name for name, parameter in self.step.named_parameters() if parameter.requires_grad]
            listed = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            if listed is None:
                raise
            unused = [names[int(index)].removeprefix("model.") for index in listed[1].split()]
            more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
            raise JobError(
                "ddp.find_unused_parameters",
                False,
                f"the loss does not use {', '.join(unused[:8])}{more}",
                "Set it to true, use them in the forward pass, or set requires_grad=False on them",
            ) from None

    def accumulating(self, more: bool) -> AbstractContextManager[None]:
        """Skip the gradient averaging while micro-batches follow, and under post-local SGD after its start."""
        return self.ddp.no_sync() if more or self._local() else NOTHING

    def finish_step(self, optimizer: torch.optim.Optimizer, due: bool) -> bool:
        """Under post-local SGD, average weights and optimizer state when that is due.

        Averaging the momenta too (Yu et al. 2019, arXiv 1905.03817) makes the ranks equal, so a checkpoint is whole.
        """
        if not self._rarely:
            return True
        averages = self._averages(due)
        if averages and self._local():
            average([p.data for p in self.step.model.parameters()], self.world_size)
            states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim()]
            average(states, self.world_size)
            self.share_buffers()
        self.steps += 1
        return averages

    def _local(self) -> bool:
        """Whether the current step keeps its gradients to itself."""
        return self._rarely and self.steps >= self.job.ddp.sync_start

    def _averages(self, due: bool) -> bool:
        """Whether all ranks are equal when the current step ends."""
        every, start = self.job.ddp.sync_every, self.job.ddp.sync_start
        return due or not self._local() or (self.steps + 1 - start) % every == 0

    def share_buffers(self) -> None:
        """Give all ranks rank 0's buffers; DDP does it before a forward pass of training only."""
        buffers = list(self.step.model.buffers())
        if buffers:
            dist._broadcast_coalesced(self.ddp.process_group, buffers, 250 * 2**20, 0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank (one collective)."""
        tensor = torch.tensor([float(flag)])
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor.item())

    def gather_objects(self, value: Any) -> list[Any]:
        """Small picklable values of all ranks."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, value)
        return parts

    def share(self, value: Any, source: int = 0) -> Any:
        """The value of rank `source`, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, source)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """Destroy the process group.

        Its objects stay referenced: gloo's destructor joins a thread that may wait for the lock of the interpreter,
        which the destructor holds (torch 2.13: one end of ten with 4 ranks hung).
        """
        if dist.is_initialized():
            _ended.append((self, dist.group.WORLD))
            dist.destroy_process_group()


_ended: list[Any] = []


def average(tensors: list[Tensor], world_size: int) -> None:
    """Replace tensors by their means over all ranks, in place, with one collective."""
    if not tensors:
        return
    flat = torch._utils._flatten_dense_tensors(tensors)
    dist.all_reduce(flat)
    flat /= world_size
    for tensor, mean in zip(tensors, torch._utils._unflatten_dense_tensors(flat, tensors), strict=True):
        tensor.copy_(mean)


def add_comm_hook(ddp: DistributedDataParallel, options: Ddp) -> None:
    """Register the gradient compression that the job asks for."""
    if options.compression == "none":
        return
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if options.compression == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=options.powersgd_rank, start_powerSGD_iter=10
        )
        hook = powerSGD_hook.powerSGD_hook
        ddp.register_comm_hook(state, hook if ddp.device_type != "cpu" else lambda s, bucket: finish(hook(s, bucket)))
    elif options.compression == "bf16":  # under another name: torch refuses its own hook with gloo, which can do it
        ddp.register_comm_hook(None, lambda group, bucket: default_hooks.bf16_compress_hook(group, bucket))
    else:
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)


def finish(bucket: torch.futures.Future[Tensor]) -> torch.futures.Future[Tensor]:
    """Wait for a bucket before the next: PowerSGD starts more collectives in callbacks, in any order over buckets.

    gloo pairs collectives by their order: with two buckets, ranks of torch 2.13 aborted.
    """
    bucket.wait()
    return bucket
