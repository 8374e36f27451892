"""What the training loop asks of a mode, with the answers of a single process.

The modes themselves are in `trainer.parallel.modes` (single, dp), and, on `trainer.parallel.group`, files of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.job import Job
from trainer.data.sampler import MicroBatch
from trainer.parallel.fast_path import run_backward
from trainer.parallel.returned import check_count
from trainer.parallel.shards import local
from trainer.parallel.step import Step
from trainer.task import Task
from trainer.wiring.devices import rank_gpus, use_cuda
from trainer.wiring.rank import RankWiring


class DeferredScalar:
    """A number that a GPU is still computing, such as a loss; a copy to the CPU is queued.

    Reading it waits only for the work that was queued before the copy. `Tensor.item()` would wait for everything that
    is queued, which one step later includes the next forward and backward pass.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value.to("cpu", non_blocking=True)  # torch uses page-locked memory for such a copy
        self.copied = torch.cuda.Event()
        self.copied.record()

    def __float__(self) -> float:
        self.copied.synchronize()
        return self.value.item()


class Parallel:
    """How a rank computes a step, and how it exchanges values with the other ranks; here there are none."""

    module: nn.Module
    """The step, wrapped for the devices of this rank; it exchanges nothing with the other ranks."""
    warms_up = False
    """Whether `warm_up` must be called before the first step."""
    lockstep = False
    """Whether all ranks must compute a batch at the same time."""
    shard: tuple[int, int] | None = None
    """Which part of how many this rank holds of each weight; None: it holds them all."""
    steps = 0
    """How many steps are done. The loop sets it when it resumes."""
    updates = 1
    """In each step; every one has so small a part of the learning rate."""
    has_whole_state = True
    """Whether what this rank holds after a step is all that a training goes on from."""
    stops_anywhere = False
    """Whether rank 0's state is whole where all ranks stop, even if ranks are not alike there."""
    least_samples = 1
    """Of a micro-batch; a smaller one has its first sample more than once, and the others do not count."""
    speaks = True
    """Whether what this rank computes of its part is told; of several ranks with one part, one does."""
    cuts_model = False
    """Whether each rank holds a stage of the model, so that all must give theirs to a checkpoint."""
    optimizer: torch.optim.Optimizer
    """The loop sets it."""
    irreproducible = ""
    """Why two runs of one job differ, if they do."""
    _gradient: tuple[Any, Tensor] = None, torch.empty(0)
    _loss: Tensor | None = None
    """This rank's part of the global mean loss of the current step, so far."""
    _count: Tensor | None = None
    """Of losses that come as sums and counts, this rank's part of the mean count per sample."""

    def __init__(self, job: Job, wiring: RankWiring) -> None:
        self.job = job
        self.rank, self.world_size = wiring.rank, wiring.world_size
        self.part, self.parts = self.rank, self.world_size
        """Of each global batch, which part this rank computes, and of how many; a part of -1: none."""
        self.local_rank, self.restarts = wiring.local_rank, wiring.restarts
        self.apply: Callable[[], None] = lambda: None
        """Updates the weights of this rank by its gradients. The loop sets it."""
        self.cuda = use_cuda(job)
        gpus = rank_gpus(job, self.local_rank) if self.cuda else []
        self.devices = [torch.device("cuda", index) for index in gpus] or [torch.device("cpu")]
        """All that this rank computes on. Results are on the first."""
        self.device = self.devices[0]
        if self.cuda:
            torch.cuda.set_device(self.device)

    def build(self, task: Task, seed: Callable[[], None]) -> tuple[nn.Module, torch.device]:
        """The user's model, and where it is to be from here on. `seed`: the generators, before the model is made."""
        seed()
        return task.model(), self.device

    def wrap(self, step: Step) -> None:
        """Take the module that computes the losses of a step. Call this once, before any step."""
        self.step = self.module = step

    def warm_up(self, batch: Any, count: int) -> None:
        """Compute a backward pass of zeros, so that the mode can arrange what only a step can arrange."""

    def compute(self, batch: Any, count: int, evaluate: bool = False) -> Any:
        """What the step makes of a batch of `count` samples, on this rank alone."""
        return self.module(batch, evaluate)

    def learn(self, batch: Any, micro: MicroBatch, scaler: torch.amp.GradScaler | None) -> None:
        """Add the gradients of a micro-batch, and remember its loss for `agree`."""
        losses = self.losses(batch, len(micro.indices), micro.last)
        check_count(losses, len(micro.indices))
        # The mean over the global batch: the sum over the parts will be divided by their number.
        self.backward(losses, self.parts * bool(micro.count) / micro.step_count, scaler)

    def losses(self, batch: Any, count: int, last: bool = True) -> Tensor:
        """The losses of this rank's micro-batch, on the first device, as `read_losses` gives them; `last`: of the step.

        `count`: its samples.
        """
        losses: Tensor = self.compute(batch, count)
        return losses

    def backward(self, losses: Tensor, weight: float, scaler: torch.amp.GradScaler | None) -> None:
        """Add the gradients of a micro-batch, and remember its loss for `agree`.

        The sum of the losses times `weight` is this rank's part of the global mean loss; `scaler` multiplies it (fp16).
        Of sums and counts it is the same, until `agree` knows the global count.
        """
        key = (weight, losses.shape, losses.dtype)
        if self._gradient[0] != key:  # of the weighted sum, which autograd need not compute; most steps share it
            self._gradient = key, torch.full_like(losses, weight)
        gradient = self._gradient[1]
        if losses.dim() == 1:
            loss = torch.dot(losses.detach(), gradient)
        else:
            loss, count = (losses.detach() * weight).sum(0)
            gradient[:, 1] = 0
            self._count = count if self._count is None else self._count + count
        self._loss = loss if self._loss is None else self._loss + loss
        self._backward(losses, gradient if scaler is None else scaler.scale(gradient))

    def _backward(self, losses: Tensor, gradient: Tensor) -> None:
        run_backward((losses,), (gradient,))

    def agree(self, due: bool) -> DeferredScalar | float:
        """End a step's backward passes: its global mean loss.

        `due`: the step ends an epoch, or an evaluation or a checkpoint follows it.
        """
        loss = self._loss
        assert loss is not None
        if self._count is not None:
            loss = self._divide(loss, self._count)
        self._loss, self._count = None, None
        return DeferredScalar(loss) if self.cuda else loss.item()

    def _divide(self, loss: Tensor, count: Tensor) -> Tensor:
        """Divide the loss, and all gradients, by the mean count per sample; where nothing counted both are zero."""
        share = torch.where(count > 0, 1 / count, 1)
        for parameter in self.step.model.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(share)
        return loss * share

    def update(self) -> None:
        """Update the weights by what was agreed on."""
        self.apply()

    def clip(self, parameters: Sequence[Tensor], norm: float) -> None:
        """Clip the gradients to this global norm."""
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def whole_state(self, weights: dict[str, Any], objects: dict[str, Any]) -> None:
        """Let rank 0's hold all that ranks have a part of: the model's weights, and what is kept of each object."""

    def measurements(self) -> dict[str, float]:
        """What else there is to record of the steps since the last call."""
        return {}

    def finish_step(self, optimizer: torch.optim.Optimizer, due: bool) -> bool:
        """Do what the mode does after an update; return whether all ranks hold the same weights now."""
        return True

    def share_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Give all ranks the buffers of rank 0's modules, such as batch statistics: a checkpoint holds those."""

    def spread(self, item: Any, state: Any) -> Any:
        """The state dict of a module or optimizer, as it is to be loaded on this rank."""
        return state

    def meet(self) -> None:
        """Wait until all ranks have come here."""

    def differing_weights(self) -> list[str]:
        """The names of weights that are not the same on all ranks, though they should be."""
        return []

    def any(self, flag: bool, beat: Callable[[], None] | None = None) -> bool:
        """Whether the flag is set on any rank. `beat`: signs of life, where others may be long in coming."""
        return flag

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The means over the ranks of named numbers, of each name over those that have it."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """What all ranks say, by their ranks: what JSON can say, with tensors in it."""
        return [value]

    def share(self, value: Any, source: int = 0) -> Any:
        """What rank `source` says, on all ranks: what JSON can say, with tensors in it."""
        return value

    def hand_out(self, parts: Sequence[Tensor], source: int, beat: Callable[[], None]) -> None:
        """Give all ranks the bytes of rank `source`, in place, each part of shape (bytes,). `beat`: signs of life."""

    def close(self) -> None:
        """Leave the group when all ranks have come here."""
