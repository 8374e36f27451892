"""The session: what a training stands on when its loop is the user's own.

A script keeps its models, optimizers and losses. The session gives it ranks, batches in an exact order, and a boundary
between any two of them: there stops are agreed on, states kept, checkpoints committed and signs of life given.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.generators import model_generators
from trainer.errors import JobError, Stopped
from trainer.parallel.base import DeferredScalar
from trainer.parallel.wrapping import evaluating, settle, shard_module, wrap_module
from trainer.signals import FLAG, SIGNALS
from trainer.training.course import Course
from trainer.training.misuse import check_logged, check_shard, check_shared, check_update, refusal
from trainer.training.once import make_once
from trainer.training.own_evaluation import evaluate_samples
from trainer.training.place import find_place


class Session(Course):
    """One training of a script, on all its ranks. Use it as `with muster.Session() as session:`."""

    def __init__(self, run: str | Path | None = None, **settings: Any) -> None:
        """Join the other ranks, and find what the training goes on from.

        `run`: a folder to keep everything in and to go on from, by default a new one in `./runs`. Under `muster` the
        run has a folder already, and that one counts.
        `settings`: keys of a job file, such as `seed=1` or `checkpoint={"every_steps": 100}`; they win over the job
        file. Raises JobError, or SystemExit(64) where no agent tells of it: a setting is wrong.
        """
        self.handlers = {number: signal.getsignal(number) for number in SIGNALS}
        FLAG.install()
        try:
            place = find_place(run, settings)
        except JobError as error:
            raise refusal(error) from None
        super().__init__(place)

    # Its place.
    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.parallel.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.parallel.world_size

    @property
    def local_rank(self) -> int:
        """The number of this process on its node."""
        return self.parallel.local_rank

    @property
    def device(self) -> torch.device:
        """What this rank computes on."""
        return self.parallel.device

    @property
    def is_primary(self) -> bool:
        """Whether this is rank 0, which prints and writes what there is one of."""
        return self.rank == 0

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.report.run.path

    # What is trained.
    def wrap(self, module: nn.Module, *, shard: bool | Iterable[nn.Module] | None = None, **options: Any) -> Any:
        """The module on this rank's device, under DDP where there are ranks; `options` are those of DDP.

        With `parallel="fsdp"` it is sharded: `shard` names the layers to gather one at a time, by default large ones in
        containers; False: this module is not.
        """
        check_shared(module, self.gradients.modules)
        if self.world_size > 1 and (self.job.parallel == "fsdp" or shard):
            check_shard(self.job, shard, options)
        if self.parallel.shard is not None and shard is not False:
            layers = None if shard in (None, True) else shard
            wrapped = shard_module(module, self.parallel, layers, self.gradients)  # type: ignore[arg-type]
        else:
            wrapped = wrap_module(module, self.parallel, options)
        self.gradients.add(wrapped)
        return wrapped

    def track(self, **objects: Any) -> None:
        """Make objects part of checkpoints; where the run goes on, give them the state that they had.

        Anything with `state_dict` and `load_state_dict`. Raises JobError: too late, or a checkpoint does not fit.
        """
        for name, item in objects.items():
            if self.begun:
                problem = "comes after the first batch, so a checkpoint may lack it"
                raise JobError("session.track", name, problem, "Track all objects before the first batch")
            if name in self.state.tracked.objects:
                raise JobError("session.track", name, "is tracked already", "Give it another name")
            if not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict")):
                problem = f"{type(item).__name__} has no state_dict and load_state_dict"
                raise JobError("session.track", name, problem, "Give the class these two methods")
            self.state.track(**{name: item})
            if isinstance(item, nn.Module):
                if all(item is not known for known in self.gradients.modules):  # `wrap` has not seen it
                    settle(item)
                self.gradients.add(item)
                self.own_generators |= {f"{name}.{path}": each for path, each in model_generators(item).items()}
            if isinstance(item, torch.optim.Optimizer):
                item.register_step_pre_hook(self._note_update)
            if self.found is not None:
                self.state.restore_object(self.found, name)
                self._restore_rates(getattr(item, "optimizer", None))
            elif self.job.checkpoint.load and name == "model":
                self.state.load_weights()

    def _note_update(self, *_: Any) -> None:
        check_update(self.updates)
        self.updated = True

    def _restore_rates(self, optimizer: Any) -> None:
        """A scheduler that was made after its optimizer was restored has set the rates of its own beginning."""
        for name, item in self.state.tracked.objects.items():
            if item is optimizer and self.found is not None:
                self.state.restore_object(self.found, name)

    def once_per_node(self, path: str | Path, make: Callable[[Path], Any]) -> Path:
        """`path`, which one rank of each node makes if it is not there: `make` is given a temporary path to write.

        The others wait. What was made half is never believed: it gets its name when it is whole.
        """
        return make_once(Path(path), make, self.parallel, self.pulse)

    # What it says.
    def log(self, **values: Any) -> None:
        """Record numbers of this update; the means over the ranks are written every `log.every_steps` updates.

        A loss, by its name, that is NaN or infinite ends the run, or with `train.on_nan: skip` is only recorded.
        """
        check_logged(values)
        for name, value in values.items():
            if "loss" not in name:
                self.logged[name] = value.detach() if isinstance(value, Tensor) else value
            elif isinstance(value, Tensor) and value.is_cuda:
                self.logged[name] = value.detach()
                self._check_loss(DeferredScalar(value.detach()))
            else:
                number = self.logged[name] = float(value.item() if isinstance(value, Tensor) else value)
                if not math.isfinite(number):
                    self._check_loss(number)

    def _check_loss(self, value: DeferredScalar | float) -> None:
        self.loss_check.allows_update(value, self.step + 1, [self.micro] if self.micro else [])

    def evaluate(
        self, dataset: Any, function: Callable[[Any], Mapping[str, Any]], batch_size: int = 256, *,
        collate: Callable[[list[Any]], Any] | None = None, workers: int = 0,
    ) -> dict[str, float]:  # fmt: skip
        """The means of per-sample values over a dataset, each sample once, equal at any number of ranks.

        `function` makes of a batch a tensor of shape (batch,) for each name. All tracked modules are in evaluation
        mode, without gradients. The means are logged; `checkpoint.best` may name one.
        """
        started = time.perf_counter()
        self.report.phase("evaluating", self.position)
        options = dataclasses.replace(self.job.data, workers=workers)
        self.parallel.share_buffers(self.gradients.modules)
        with evaluating(self.gradients.modules):
            means = evaluate_samples(
                self.parallel, dataset, function, batch_size, collate, options, self.job.seed, self.step,
                partial(self.report.phase, "evaluating", self.position),
            )  # fmt: skip
        self.measured(means)
        self.report.pause(time.perf_counter() - started)
        self.seed_generators(self.rank if self.begun else 0)
        return means

    def measured(self, metrics: dict[str, float]) -> None:
        """Record what the model is worth now, equal on all ranks; `checkpoint.best` may name one of the metrics."""
        at = dataclasses.replace(self.position, step=self.step + (self.source is not None))  # whose update is done
        before = self.state.metrics if self.state.measured_at == at.step else {}  # several evaluations
        self.state.metrics, self.state.measured_at = {**before, **metrics}, at.step
        self.report.evaluation(at, metrics)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, such as to end a loop early on all of them."""
        return self.parallel.any(flag)

    # Its end.
    def __enter__(self) -> "Session":
        self.entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.stopped:  # somebody caught it: the training is not done for that
                raise Stopped
            if error is None or (isinstance(error, SystemExit) and not error.code):  # a script may end itself
                self.left = self.left or self.source is not None
                self._finish()
            elif isinstance(error, Stopped):
                self.parallel.close()
        except JobError as problem:
            raise refusal(problem) from None
        finally:
            self.stops.close()  # after the group: until all ranks are here, one may wait for an answer
            self.state.close()
            self.report.close()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.pulse.beat(self.step, "script")  # what follows is the script's own affair
        if isinstance(error, JobError):
            raise refusal(error) from None

    def _finish(self) -> None:
        """The training is done: its last checkpoint is committed, and its result is there."""
        self._check_left()
        if not self.state.settle() or (self.begun and (self.saved != self.place or self.state.owed)):
            self.save(wait=True)
        self.report.finish(self.state.metrics)
        self.parallel.close()
