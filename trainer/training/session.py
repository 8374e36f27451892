"""The session: what a training stands on when its loop is the user's own.

A script keeps its models, optimizers and losses. The session gives it ranks, batches in an exact order, and a boundary
between any two of them: there stops are agreed on, states kept, checkpoints committed and signs of life given.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.training_state import TrainingState
from trainer.data.batches import plain_collate
from trainer.data.generators import Generators, model_generators, seed_own
from trainer.data.rng import STEPS, derive_seed, seed_generators
from trainer.errors import WRONG_JOB, JobError, Stopped
from trainer.parallel.base import DeferredScalars
from trainer.parallel.wrapping import Gradients, evaluating, wrap_module
from trainer.signals import FLAG
from trainer.training.batch_source import BatchSource, open_batches
from trainer.training.evaluation import evaluate_samples
from trainer.training.finite_loss import LossCheck
from trainer.training.once import make_once
from trainer.training.place import find_place

LEFT_S = 30.0
"""For the other ranks to leave a loop that one has left."""


class Session:
    """One training of a script, on all its ranks. Use it as `with muster.Session() as session:`."""

    def __init__(self, run: str | Path | None = None, **settings: Any) -> None:
        """Join the other ranks, and find what the training goes on from.

        `run`: a folder to keep everything in and to go on from; without it that of the job, else a new one in `./runs`.
        `settings`: keys of a job file, such as `seed=1` or `checkpoint={"every_steps": 100}`; they win over the job
        file. Raises JobError, or without an agent SystemExit(64): a setting is wrong.
        """
        try:
            place = find_place(run, settings)
        except JobError as error:
            raise self._refuse(error) from None
        self.job, self.parallel, self.report, self.pulse = place.job, place.parallel, place.report, place.pulse
        self.supervised = place.supervised
        FLAG.install()
        self.state = TrainingState(self.job, self.parallel, self.report, self._explain)
        self.position = self.state.position
        self.gradients = Gradients()
        self.own_generators: Generators = {}
        self.loss_check = LossCheck(self.job.train.on_nan, self.report)
        self.logged: dict[str, Any] = {}
        self.begun = self.active = False
        self.updates, self.epoch_ends = True, False
        self.epochs_before = 0
        self.in_epochs = False
        self.saved_step = -1
        self.found = self.state.find()
        if self.found is not None:
            self.state.restore_position(self.found)
        self._seed()

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

    @property
    def step(self) -> int:
        """Updates done, those of earlier starts of the run included."""
        return self.position.step

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.position.epoch

    # What is trained.
    def wrap(self, module: nn.Module, **options: Any) -> Any:
        """The module on this rank's device, under DDP where there are ranks; `options` are those of DDP."""
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
                self.gradients.add(item)
                self.own_generators |= {f"{name}.{path}": each for path, each in model_generators(item).items()}
            if isinstance(item, torch.optim.Optimizer):
                item.register_step_pre_hook(self._check_update)
            if self.found is not None:
                self.state.restore_object(self.found, name)
            elif self.job.checkpoint.load and name == "model":
                self.state.load_weights()

    def once_per_node(self, path: str | Path, make: Callable[[Path], Any]) -> Path:
        """`path`, which one rank of each node makes if it is not there: `make` is given a temporary path to write.

        The others wait. What was made half is never believed: it gets its name when it is whole.
        """
        return make_once(Path(path), make, self.parallel, self.pulse)

    # The loop.
    def batches(
        self, dataset: Any, batch_size: int, epochs: int | None = None, steps: int | None = None, *,
        shuffle: bool = True, accumulate: int = 1, collate: Callable[[list[Any]], Any] | None = None, workers: int = 0,
    ) -> Iterator[Any]:  # fmt: skip
        """This rank's share of one global batch after another, on its device, from where the training stands.

        `batch_size`: samples in each update, over all ranks. `epochs` and `steps` bound the training, whichever ends
        first; inside of `epochs()` neither is given. `accumulate`: micro-batches of an update. `workers`: processes
        that load. The order of samples is the same at any number of ranks.
        """
        options = self.job.data
        options.workers = workers or options.workers
        source = open_batches(dataset, batch_size, accumulate, shuffle, collate or plain_collate, self)
        try:
            if self.in_epochs:
                if epochs or steps:
                    problem, remedy = "is set by session.epochs already", "Leave it out of session.batches"
                    raise JobError("epochs", epochs or steps, problem, remedy)
                yield from self._pass(source, math.inf)
                return
            end = math.inf if steps is None else steps
            for _ in self.epochs(epochs or (1 if steps is None else sys.maxsize)):
                yield from self._pass(source, end)
                if self.step >= end:
                    return
        finally:
            source.close()

    def epochs(self, count: int) -> Iterator[int]:
        """The numbers of the epochs to do, from 0 to `count - 1`; those that are done are left out."""
        first, self.epochs_before = self.epochs_before, min(sys.maxsize, self.epochs_before + count)
        for number in range(self.position.epoch - first if self.position.epoch > first else 0, count):
            self.in_epochs = True
            try:
                yield number
            finally:
                self.in_epochs = False
            self.position.epoch, self.position.samples = first + number + 1, 0
            self._save_if(True)

    def steps(self, count: int) -> Iterator[int]:
        """The numbers of the updates to do, from 0 to `count - 1`, for a training without a dataset."""
        self._begin(count, count)
        for number in range(self.step, count):
            self._prepare(1.0, True)
            yield number
            self._pass_boundary(0)

    def _pass(self, source: BatchSource, end: float) -> Iterator[Any]:
        """The rest of an epoch, or what is left until so many updates are done."""
        if self.active:
            raise JobError("session.batches", "a second loop", "runs inside of another", "End the first loop before")
        self.active = True
        self._begin(source.count_steps(self.position, end), source.steps_per_epoch)
        try:
            for micro, batch in source.read(self.position):
                if self.step >= end:
                    break
                share = micro.count * self.world_size / micro.step_count
                self.updates = micro.last
                self.epoch_ends = micro.last and source.ends_after(self.position, micro.step_count)
                self._prepare(share, micro.last)
                self.report.samples(self.position, [(micro, None)])
                yield batch
                if micro.last:
                    self.position.samples += micro.step_count
                    self._pass_boundary(micro.step_count)
        finally:
            self.active, self.updates, self.epoch_ends = False, True, False

    def _begin(self, steps: int, steps_per_epoch: int) -> None:
        """The first batch of a loop comes next."""
        if not self.begun:
            self.begun = True
            missing = self.state.untracked(self.found)
            if missing:
                problem = "is in the checkpoint, and the script does not track it"
                raise JobError("session.track", missing[0], problem, "Track what the run began with")
            self.found = None
            self.report.start(self.position, steps, steps_per_epoch)

    def _prepare(self, share: float, last: bool) -> None:
        """Get ready for what the script computes next; `share`: how much its mean counts in the global mean."""
        self.gradients.set(share, last)
        self._seed()

    def _seed(self) -> None:
        value = derive_seed(self.job.seed, self.step, self.rank if self.begun else 0, STEPS)
        seed_generators(value, self.parallel.devices)
        if self.own_generators:
            seed_own(self.own_generators, value)

    def _pass_boundary(self, samples: int) -> None:
        """An update is done. Raises Stopped: all ranks agreed to stop here, and the checkpoint is committed."""
        self.position.step += 1
        self._write_log()
        self.report.done(self.position, samples)
        if self.parallel.any(FLAG.requested is not None):
            self._save(wait=True)
            self.report.event("stopped", step=self.step)
            raise Stopped
        every = self.job.checkpoint.every_steps
        self._save_if(bool(every and self.step % every == 0))

    def _save_if(self, due: bool) -> None:
        if due:
            self._save(wait=False)

    def _save(self, wait: bool) -> None:
        self.loss_check.read_deferred()
        self.state.save(wait)
        self.saved_step = self.step

    # What it says.
    def log(self, **values: Any) -> None:
        """Record numbers of this update; the means over the ranks are written every `log.every_steps` updates.

        A loss, by its name, that is NaN or infinite ends the run, or with `train.on_nan: skip` is only recorded.
        """
        self.logged.update((name, value.detach() if isinstance(value, Tensor) else value) for name, value in values.items())
        for name, value in values.items():
            if "loss" in name:
                deferred = isinstance(value, Tensor) and value.is_cuda
                number = DeferredScalars(value.detach().view(1)) if deferred else float(value)
                self.loss_check.allows_update(number, self.step + 1, [])

    def _write_log(self) -> None:
        if self.step % self.job.log.every_steps == 0:
            values = self.parallel.mean({name: float(value) for name, value in self.logged.items()})
            self.report.write(self.step, "train", values)
        self.logged.clear()

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
        with evaluating(self.gradients.modules):
            means = evaluate_samples(self, dataset, function, batch_size, collate or plain_collate, workers)
        self.state.metrics, self.state.measured_at = means, self.step + self.active
        self.report.evaluation(self.position, means)
        self.report.pause(time.perf_counter() - started)
        self._seed()
        return means

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, such as to end a loop early on all of them."""
        return self.parallel.any(flag)

    # Its end.
    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self.state.close()
            self.report.close()
        if isinstance(error, JobError):
            raise self._refuse(error) from None

    def _finish(self) -> None:
        if self.begun and self.saved_step != self.step:
            self._save(wait=True)
        self.state.wait()
        self.report.finish(self.state.metrics)
        self.pulse.beat(self.step, "finishing")
        self.parallel.close()
