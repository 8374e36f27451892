"""One small training step and one small evaluation of everything before the first epoch, so nothing fails after hours.

Nothing of it counts: no weight, buffer, generator or place in the data changes. A restart of a run that has passed does
without it.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.checkpoint.savable import check_savable
from trainer.config.job import Job
from trainer.data.device_mover import DeviceMover
from trainer.data.loader import Loader
from trainer.data.nested import leaves
from trainer.data.sampler import Indices, Position, Sampler
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.module_state import evaluation_mode
from trainer.parallel.returned import check_count, read_summary
from trainer.parallel.step import apply_model
from trainer.reporting.rank_report import Report
from trainer.task import Task
from trainer.training.determinism import any_kernels
from trainer.training.evaluation import evaluate_batch
from trainer.training.unchanged import unchanged
from trainer.training.user_model import check_weights

SAMPLES = 4
"""At most, of each batch of a device: shapes and types show in a few."""
Keys = tuple[int, np.ndarray[Any, np.dtype[np.int64]]]


@dataclass
class Trial:
    """What is tried, with the parts of a `Trainer`."""

    job: Job
    task: Task
    parallel: Parallel
    report: Report
    sampler: Sampler
    used: int
    """How many samples of the first epoch are used: the training may be shorter."""
    eval_count: int
    loaders: tuple[Loader, Loader]
    """For training and for evaluation."""
    mover: DeviceMover
    seed: Callable[[int], None]
    """Seeds the generators for a step of this rank."""

    def run(self, model: nn.Module, contents: Callable[[], dict[str, Any]]) -> None:
        """Try it. `model`: what evaluations evaluate. Raises JobError: something would fail later."""
        check_savable(contents())
        step = self.parallel.step
        with unchanged(step.model, self.task), plainly(step):
            trained = list(step.model.parameters())
            self.train()
            check_weights(step.model, trained)
            own, step.model = step.model, model
            try:
                with evaluation_mode(model):
                    names = self.evaluate()
            finally:
                step.model = own
        best = self.job.checkpoint.best
        if names and best and best not in names:
            problem, remedy = "is not a metric of this task", f"The metrics are {', '.join(names)}"
            raise JobError("checkpoint.best", best, problem, remedy)
        for device in self.parallel.devices:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

    def train(self) -> None:
        """The losses of the smallest micro-batch of an epoch, such as a last one with a single sample."""
        start = (self.used - 1) // self.sampler.batch_size * self.sampler.batch_size
        ends = itertools.islice(self.sampler.epoch(Position(samples=start)), self.sampler.accumulate)
        micro = min(ends, key=lambda micro: len(micro.indices))
        replicas = self.job.devices_per_node if self.job.parallel == "dp" else 1
        few = micro.indices[: SAMPLES * replicas]
        again = len(few) < len(micro.indices)
        try:
            self.try_losses(few, again)
        except Exception as error:
            if not (again and may_be_size(error)):
                raise
            self.try_losses(micro.indices, False)  # what is made for whole batches need not take a part of one

    def try_losses(self, indices: Indices, again: bool) -> None:
        """Compute the losses of some samples, and check them; `again`: more are tried if the size may be wrong."""
        batch = self.read_twice(0, (0, indices))
        self.seed(self.parallel.rank)
        try:
            losses = self.parallel.compute(batch, len(indices))
            check_count(losses, len(indices))
        except Exception as error:
            if not (again and may_be_size(error)):
                self.explain_call(batch, error)
            if not isinstance(error, JobError) or len(indices) >= SAMPLES:
                raise
            problem = f"{error.problem} (met in a batch of {len(indices)}, the last of an epoch)"
            raise JobError(error.key, error.value, problem, error.remedy) from error
        if not losses.requires_grad:
            problem = "has no gradient: it does not depend on the weights of the model"
            remedy = "Compute it from `output` with torch alone: no .item(), .detach(), .numpy(), torch.no_grad()"
            raise JobError("task.loss", f"shape {tuple(losses.shape)}", problem, remedy)
        if losses.dim() > 1 and not bool((losses[:, 1] >= 0).all()):
            raise JobError("task.loss", "(sum, count)", "the count is negative", "Return how many losses the sum has")

    def explain_call(self, batch: Any, error: Exception) -> None:
        """Say how the model was called when it fails, and nobody said how to call it with a batch of several parts."""
        kind = type(self.task)
        own = kind.output is not Task.output or kind.inputs is not Task.inputs
        own = own or isinstance(batch, (Tensor, tuple, list))
        if own or all(frame.f_code is not apply_model.__code__ for frame, _ in walk_tb(error.__traceback__)):
            return
        self.report.notice(
            f"the model fails when it is called with a whole {type(batch).__name__}: if it wants something else, give "
            "the task a method inputs(batch), or output(model, batch), which may return model(**batch)"
        )

    def evaluate(self) -> list[str]:
        """Metrics of the first samples, and of a last batch of few; their names, unless so few say nothing."""
        rest = self.eval_count % self.job.evaluation.batch_size
        batches = [np.arange(min(SAMPLES, self.eval_count), dtype=np.int64)]
        if 0 < rest < SAMPLES:
            batches.append(np.arange(self.eval_count - rest, self.eval_count, dtype=np.int64))
        names: list[str] = []
        for indices in batches:
            try:
                values = self.try_metrics(indices)
            except Exception as error:
                whole = np.arange(min(self.job.evaluation.batch_size, self.eval_count), dtype=np.int64)
                if indices is not batches[0] or len(indices) == len(whole) or not may_be_size(error):
                    raise
                indices = whole
                values = self.try_metrics(indices)
            sums = {name: value.double().sum(0).cpu() for name, value in values.items() if name != "loss"}
            try:
                names = ["loss", *read_summary(self.task.summary(sums, len(indices)))]
            except Exception as error:  # such as a division by the number of hits, for so few samples
                if not (isinstance(error, ArithmeticError) or may_be_size(error)):
                    raise
            many = [name for name, value in sums.items() if value.numel() > 1]
            if many and type(self.task).summary is Task.summary:
                text = f"metrics {', '.join(many)} have several values per sample: give the task a method summary"
                self.report.notice(f"{text}, or they are left out")
        return names

    def try_metrics(self, indices: Indices) -> dict[str, Tensor]:
        """Losses and metrics of some samples for evaluation."""
        batch = self.read_twice(1, (0, indices))
        with any_kernels():
            return evaluate_batch(self.parallel, batch, len(indices), lambda: self.seed(0))

    def read_twice(self, which: int, keys: Keys) -> Any:
        """A batch on the device, after each worker has read it twice: equal, or there is a warning."""
        loader = self.loaders[which]
        times = 1 if loader.batches.plain else 2 * max(1, self.job.data.workers)
        read = list(loader.read([keys] * times))
        if not all(are_equal(read[0], other) for other in read[1:]):
            kind = type(loader.batches.dataset).__name__
            self.report.notice(
                f"{loader.batches.key}: a sample of {kind} is another when it is read again with the same seed, so a "
                "restart, or other ranks and workers, change the training. Do not change it in place, and draw from "
                "random, NumPy, torch, a generator that is an attribute of dataset or transform, or the rng of a "
                "method sample(index, rng)"
            )
        [batch] = self.mover.move(iter(read[:1]))
        return batch


def may_be_size(error: Exception) -> bool:
    """Whether it is what code raises that was made for batches of another size."""
    return isinstance(error, (RuntimeError, ValueError, IndexError, AssertionError)) and not isinstance(error, JobError)


@contextmanager
def plainly(step: Any) -> Iterator[None]:
    """Without torch.compile: it would compile for shapes that never come again."""
    compiled, step.apply_model = step.apply_model, apply_model
    try:
        yield
    finally:
        step.apply_model = compiled


def are_equal(one: Any, other: Any) -> bool:
    """Whether two batches hold the same tensors, arrays, texts and numbers."""
    ours, theirs = leaves(one), leaves(other)
    return len(ours) == len(theirs) and all(map(_is_same, ours, theirs))


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.layout != torch.strided:
            return one.layout != torch.strided
        return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return bool(one == other) or (one != one and other != other)
