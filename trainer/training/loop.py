"""The training loop: one step of the global batch after another, on whatever devices `parallel` made of them."""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from trainer.config.job import Job
from trainer.data.datasets import count_samples
from trainer.data.device_mover import DeviceMover
from trainer.data.generators import find_generators, model_generators
from trainer.data.loader import Loader
from trainer.data.rng import EVALUATION
from trainer.data.sampler import Indices, MicroBatch, Position, Sampler
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.fast_path import make_step
from trainer.reporting.rank_report import Report
from trainer.task import Task
from trainer.training.boundary import Boundary
from trainer.training.cadence import Cadence
from trainer.training.continuation import Continuation
from trainer.training.determinism import missing_kernels_named
from trainer.training.evaluation import evaluate, summarize
from trainer.training.optimizer import OPTIMIZERS, Rates, make_optimizer, make_scaler
from trainer.training.schedule import make_schedule
from trainer.training.smallest_batch import check_smallest_batch
from trainer.training.trial import Trial
from trainer.training.unchanged import unchanged
from trainer.training.user_model import check_gradients, differing_weights, unfrozen_weights
from trainer.training.weight_average import WeightAverage

DATASETS = "task.train_dataset", "task.eval_dataset"
"""How errors call them."""


class Trainer(Boundary):
    """Trains one task as one job says, from wherever its checkpoints stand."""

    def __init__(
        self, job: Job, task: Task, parallel: Parallel, report: Report, model: torch.nn.Module,
        train_data: Any, eval_data: Any,
    ) -> None:  # fmt: skip
        """Put everything together; `model` is on its device already."""
        super().__init__(job, parallel, report)
        self.task = task
        train, device = job.train, parallel.device
        count, self.eval_count = (count_samples(*each) for each in zip(DATASETS, (train_data, eval_data), strict=True))
        self.sampler = Sampler(
            count, train.batch_size, train.accumulate, parallel.part, parallel.parts, job.seed,
            least=parallel.least_samples,
        )  # fmt: skip
        self.optimizer = make_optimizer(model, train)
        # A trace shall show the update by its name, and an optimizer of the user's may have hooks.
        public = bool(job.log.profile_steps) or train.optimizer not in OPTIMIZERS
        self.update_weights = self.optimizer.step if public else make_step(self.optimizer)
        self.rates = Rates(self.optimizer, train.lr)
        parallel.apply, parallel.optimizer = self.apply_gradients, self.optimizer
        self.scaler = make_scaler(train.precision, device)
        self.average = None if train.ema_decay is None else WeightAverage(model, train.ema_decay)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.checked = False
        """Whether the gradients of a first step were looked at."""
        self.compared = False
        """Whether the weights of all ranks were."""
        self.told: set[str] = set()
        self.loader, self.eval_loader = (
            Loader(data, task, job.data, job.seed, parallel.cuda, key)
            for key, data in zip(DATASETS, (train_data, eval_data), strict=True)
        )
        dtype = torch.float64 if train.precision == "float64" else None
        self.mover = DeviceMover(device, dtype, train.channels_last, job.data.prefetch)
        self.model = model
        self.state.track(model=model, optimizer=self.optimizer, scaler=self.scaler, average=self.average)
        self.own_generators = find_generators(task, "task") | model_generators(model)
        self.continuation = Continuation(job, self.sampler, self.state, report)
        self.plan()

    def plan(self) -> None:
        """Decide how many steps there are in all, from the position that the training goes on from."""
        self.steps = self.continuation.count_steps()
        self.cadence = Cadence(self.job, self.steps)
        self.rate = make_schedule(self.job.train, self.steps)
        self.state.facts = partial(self.continuation.facts, self.rate)

    def fit(self, on_failure: Callable[[BaseException], None] = lambda error: None) -> dict[str, float]:
        """Train to the end and return the last evaluation; `on_failure` is called with an exception before all else.

        Raises Stopped: on request, with a checkpoint committed. Raises NonFiniteLoss: with `on_nan: halt`.
        """
        try:
            with missing_kernels_named():
                for _ in self.train():
                    pass
        except BaseException as error:  # such as that of a collective whose peer is gone
            on_failure(error)
            raise
        finally:
            self.loader.close()
            self.eval_loader.close()
            self.state.close()
        return self.state.metrics

    def train(self) -> Iterator[None]:
        """Go on from where the training stands to its end, a step at each `next`."""
        self.tried = not self.try_everything()
        self.warm_up()
        self.state.resume()
        self.continuation.check_data()
        self.plan()
        self.continuation.announce(self.rate, self.steps)
        self.continuation.warn(self.parallel.irreproducible)
        self.parallel.steps = self.position.step
        self.report.start(self.position, self.steps, self.sampler.steps_per_epoch)
        if self.position.step and not self.state.evaluated:
            self.finish_step()
        while self.position.step < self.steps:
            for micros in self.epoch():
                whole = self.train_step(micros)
                self.try_savable()
                if whole:
                    self.state.boundary()
                yield
                if self.position.step >= self.steps:
                    break
        if self.state.owed:  # the last checkpoint of the attempt before could not be saved
            self.save(wait=True)

    def try_everything(self) -> bool:
        """Try what comes later, unless an earlier attempt of this launch has trained already; whether it was done."""
        # Nodes may count restarts differently under torchrun, and all ranks must do the same.
        parallel = self.parallel
        passed = parallel.share(parallel.rank == 0 and parallel.restarts > 0 and self.report.was_training())
        if not passed:
            used = min(self.sampler.count, self.steps * self.sampler.batch_size)
            check_smallest_batch(self.job, self.parallel, used, self.eval_count, self.read)
            Trial(
                self.job, self.task, self.parallel, self.report, self.sampler, used, self.eval_count,
                (self.loader, self.eval_loader), self.mover, self.seed_generators,
            ).run(self.evaluated_model, self.state.contents)  # fmt: skip
        return not passed

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The averaged weights where there are such."""
        return self.parallel.step.model if self.average is None else self.average.module

    def warm_up(self) -> None:
        """Compute a step that changes nothing, for modes that arrange themselves by it: see `Distributed.warm_up`.

        The peak of memory is counted from then on.
        """
        if not self.parallel.warms_up:
            return
        indices = next(self.sampler.epoch(Position())).indices
        with unchanged(self.model, self.task):
            self.parallel.warm_up(self.read(indices), len(indices))
        self.drop_gradients()
        for device in self.parallel.devices:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

    def read(self, indices: Indices) -> Any:
        """A batch of samples of the first epoch."""
        [batch] = self.mover.move(self.loader.read([(0, indices)]))
        return batch

    def epoch(self) -> Iterator[list[tuple[MicroBatch, Any]]]:
        """The steps from the current position to the end of its epoch, each a list of micro-batches."""
        plan, read = itertools.tee(self.sampler.epoch(self.position))
        batches = self.mover.move(self.loader.read((micro.epoch, micro.indices) for micro in read))
        group: list[tuple[MicroBatch, Any]] = []
        for micro, batch in zip(plan, batches, strict=True):
            group.append((micro, batch))
            if micro.last:
                yield group
                group = []

    def train_step(self, micros: list[tuple[MicroBatch, Any]]) -> bool:
        """One update from one global batch; afterwards whatever is due. Whether all ranks hold the same weights now."""
        position, parallel = self.position, self.parallel
        self.seed_generators(parallel.rank)
        rate = self.rates.set(self.rate(position.step) / parallel.updates)
        for micro, batch in micros:
            if micro.last and parallel.speaks:
                self.report.samples(position, micros)
            parallel.learn(batch, micro, self.scaler)
        if not self.checked and parallel.part >= 0:
            self.checked = True
            self.tell(check_gradients(self.model, self.parameters))
        step_count = micros[0][0].step_count
        after = position.after(step_count, self.sampler.count)
        due = self.cadence.evaluation(after) or self.cadence.checkpoint(after)
        loss = parallel.agree(due)
        if self.loss_check.allows_update(loss, after.step, [micro for micro, _ in micros]):
            parallel.update()
            if self.average is not None:
                self.average.update_parameters(self.model)
        self.drop_gradients()
        position.step, position.epoch, position.samples = after.step, after.epoch, after.samples
        whole = parallel.finish_step(self.optimizer, due)
        self.state.evaluated = not due
        self.report.step(position, loss, rate, step_count)
        if (whole or parallel.stops_anywhere) and position.step < self.steps and self.stops.tick():
            self.save_and_stop()
        if due:
            self.finish_step()
        return whole

    def tell(self, note: str) -> None:
        """Tell the user, each thing once; an empty note is none."""
        if note and note not in self.told:
            self.report.note(note)
            self.told.add(note)

    def apply_gradients(self) -> None:
        """Update the weights of this rank by its gradients."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.job.train.clip_norm is not None:
            self.parallel.clip(self.parameters, self.job.train.clip_norm)
        if self.scaler is None:
            self.update_weights()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def drop_gradients(self) -> None:
        """As `Optimizer.zero_grad`, which records itself for a profiler: 3 % of a step of 3 ms."""
        for parameter in self.parameters:
            parameter.grad = None

    def finish_step(self) -> None:
        """Evaluate and save where that is due after the current position; a stop may come in between."""
        position = self.position
        self.loss_check.read_deferred()
        if self.cadence.evaluation(position):
            metrics = self.evaluate()
            if metrics is None:
                self.save_and_stop()
            self.state.metrics, self.state.measured_at = metrics, position.step
            self.report.evaluation(position, metrics)
            self.tell(unfrozen_weights(self.model, self.parameters))
            if not self.compared:  # here, where ranks meet anyway: rank 0 saves without the others
                self.compared = True
                self.tell(differing_weights(self.parallel.differing_weights()))
        self.state.evaluated = True
        if self.cadence.checkpoint(position):
            self.save(wait=position.step >= self.steps)

    def evaluate(self) -> dict[str, float] | None:
        """Metrics on the held-out data, of the averaged weights where there are such; None: stop instead."""
        started = time.perf_counter()
        sums = evaluate(
            self.parallel, self.evaluated_model, self.eval_loader, self.mover, self.eval_count,
            self.job.evaluation.batch_size, self.stop_early, lambda number: self.seed_generators(number, EVALUATION),
        )  # fmt: skip
        try:
            if sums is None:
                return None
            self.seed_generators(len(sums), EVALUATION)
            return summarize(self.task, sums, self.eval_count)
        except JobError:
            if self.cadence.checkpoint(self.position):  # the training up to here shall not be lost with its metrics
                self.state.save(wait=True)
            raise
        finally:
            self.report.pause(time.perf_counter() - started)

    def stop_early(self) -> bool:
        """Whether to leave an evaluation; the last one, too: what was trained before it may not be saved yet."""
        self.report.phase("evaluating", self.position)
        return self.stops.tick()
