"""A training's way from one batch to the next: what a session does between them, and which batch comes next.

The boundary between two batches is where ranks agree on stops, checkpoints are committed and signs of life given.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from trainer.data.sampler import MicroBatch
from trainer.errors import JobError
from trainer.parallel.wrapping import Gradients
from trainer.training.batch_source import BatchSource, open_batches
from trainer.training.boundary import Boundary
from trainer.training.misuse import agree_left, explain, refusal
from trainer.training.place import Place

ENDLESS = 10**9
"""Epochs, of a loop that ends by its steps."""


class Course(Boundary):
    """Where a training of a script stands, and how it goes on."""

    def __init__(self, place: Place) -> None:
        """Find what the training goes on from."""
        super().__init__(place.job, place.parallel, place.report, explain)
        self.pulse = place.pulse
        self.state.facts = self._facts
        self.gradients = Gradients()
        self.logged: dict[str, Any] = {}
        self.source: BatchSource | None = None
        self.micro: MicroBatch | None = None
        self.micros = 0
        """Of this update, so far."""
        self.updated = False
        """Whether an optimizer has stepped since the last boundary."""
        self.updates, self.epoch_ends = True, False
        self.begun = self.in_epochs = self.left = self.entered = False
        self.passed = False
        """Whether this epoch has had its batches."""
        self.enough = False
        """Set by a loop that wants no batch after the one it has, and asks only to pass the boundary after it."""
        self.epochs_before = self.last_epoch = 0
        """Of the loops that have begun, and of this one; counted from the beginning of the training."""
        self.saved = self.place
        self.found = self.state.find()
        self.tried = self.found is not None
        if self.found is not None:
            self.state.restore_position(self.found)
            self.saved = self.place
        self.seed_generators(0)  # models and data that are made now are the same on all ranks

    @property
    def step(self) -> int:
        """Updates done, those of earlier starts of the run included."""
        return self.position.step

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.position.epoch

    def batches(
        self, dataset: Any, batch_size: int, epochs: int | None = None, steps: int | None = None, *,
        shuffle: bool = True, accumulate: int = 1, collate: Callable[[list[Any]], Any] | None = None, workers: int = 0,
    ) -> Iterator[Any]:  # fmt: skip
        """This rank's share of one global batch after another, on its device, from where the training stands.

        `batch_size`: samples in each update, over all ranks. `epochs` and `steps` bound the training, whichever ends
        first; inside of `epochs()` neither is given. `accumulate`: micro-batches of an update. `workers`: processes
        that load. The order of samples is the same at any number of ranks.
        """
        if self.source is not None:
            raise JobError("session.batches", "a second loop", "runs inside of another", "End the first loop before")
        if self.in_epochs and (epochs or steps):
            problem, remedy = "is inside of session.epochs, which counts them", "Leave it out of session.batches"
            raise JobError("session.batches", f"epochs={epochs}, steps={steps}", problem, remedy)
        options = dataclasses.replace(self.job.data, workers=workers or self.job.data.workers)
        seed = self.job.seed
        source = open_batches(dataset, batch_size, accumulate, shuffle, collate, options, seed, self.parallel)
        try:
            if self.in_epochs:
                if self.passed:
                    problem, remedy = "follows another in the same epoch", "Give each data set epochs of its own"
                    raise JobError("session.batches", "a second loop", problem, remedy)
                self.passed = True
                yield from self._pass(source, math.inf)
                return
            end = math.inf if steps is None else steps
            for _ in self.epochs(epochs if epochs is not None else 1 if steps is None else ENDLESS):
                if self.step < end:
                    yield from self._pass(source, end)
                if self.step >= end or self.enough:
                    return
        finally:
            source.close()

    def epochs(self, count: int) -> Iterator[int]:
        """The numbers of the epochs to do, from 0 to `count - 1`; those that are done are left out."""
        first, self.epochs_before = self.epochs_before, self.epochs_before + count
        if self.position.epoch < first:  # the loop before was left in the middle of an epoch
            self.position.epoch, self.position.samples = first, 0
        for number in range(max(0, self.position.epoch - first), count):
            self.in_epochs, self.last_epoch, self.passed = True, first + count, False
            try:
                yield number
            finally:
                self.in_epochs = False
            self.position.epoch, self.position.samples = first + number + 1, 0
            self.save(wait=False)

    def steps(self, count: int) -> Iterator[int]:
        """The numbers of the updates to do, from 0 to `count - 1`, for a training without a dataset."""
        self.begin(count, count)
        for number in range(self.step, count):
            self.prepare(1.0, True)
            yield number
            self.end_step(0)

    def _pass(self, source: BatchSource, end: float) -> Iterator[Any]:
        """The rest of an epoch, or what is left until so many updates are done."""
        self._check_data(source)
        self.begin(*self._count_steps(source, end))
        self.source, complete = source, False
        kept = self.state.restored.pop("stream", {})
        if note := source.explain_start(self.position, kept):
            self.report.note(note)
        try:
            for micro, batch in source.read(self.position, kept):
                self.micro = micro
                self.updates = micro.last
                self.epoch_ends = micro.last and source.ends_after(self.position, micro.step_count)
                self.prepare(micro.count * self.parallel.world_size / micro.step_count, micro.last)
                self.report.samples(self.position, [(micro, None)])  # before a rank may die of the step
                yield batch
                if micro.last:
                    self.position.samples += micro.step_count
                    self.end_step(micro.step_count)
                    if self.position.step >= end or self.enough:
                        break
            complete = True
        finally:
            self.left = not complete
            if self.left and self.updated:  # by `break` after the update, which counts
                self.position.samples += micro.step_count
                self.position.step += 1
            self.source, self.micro, self.updates, self.epoch_ends = None, None, True, False

    def begin(self, steps: int, steps_per_epoch: int) -> None:
        """The first batch of a loop comes next."""
        self._check_left()
        if self.begun:
            return
        if not self.entered:
            problem, remedy = "is not in a `with`, so nobody would end it", "Write `with muster.Session() as session:`"
            raise refusal(JobError("muster.Session", "the session", problem, remedy))
        self.begun = True
        missing = self.state.untracked(self.found)
        if missing:
            problem = "is in the checkpoint, and the script does not track it"
            raise JobError("session.track", missing[0], problem, "Track what the run began with")
        self.found = None
        self.report.start(self.position, steps, steps_per_epoch)

    def prepare(self, share: float, last: bool) -> None:
        """Get ready for what the script computes next; `share`: how much its mean counts in the global mean."""
        self.gradients.set(share, last)
        self.seed_generators(self.parallel.rank + self.micros * self.parallel.world_size)
        self.micros += 1
        self.updated = False

    def end_step(self, samples: int) -> None:
        """An update is done. Raises Stopped: all ranks agreed to stop here, and the checkpoint is committed."""
        position, job = self.position, self.job
        position.step += 1
        self.micros = 0
        self.report.done(position, samples)
        if position.step % job.log.every_steps == 0:
            self.report.log(position, self.parallel.mean({name: float(value) for name, value in self.logged.items()}))
        self.logged.clear()
        self.try_savable()
        if self.stops.tick():
            self.save_and_stop()
        every = job.checkpoint.every_steps
        if every and position.step % every == 0 and not self.epoch_ends:  # then it is saved when the epoch is over
            self.save(wait=False)
        self.state.boundary()

    def save(self, wait: bool) -> None:
        super().save(wait)
        self.saved = self.place

    @property
    def place(self) -> tuple[int, ...]:
        """Where the training stands."""
        return dataclasses.astuple(self.position)

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says beside the position."""
        source = self.source
        return {} if source is None else {"samples": source.count, "stream": source.place()}

    def _check_data(self, source: BatchSource) -> None:
        """Raises JobError: the data changed in the middle of an epoch."""
        before, now = self.state.restored.pop("samples", None), source.count
        if self.position.samples and before != now and before is not None and now is not None:
            problem = f"had {before} when the run stopped in the middle of epoch {self.epoch + 1}"
            raise JobError("session.batches", f"{now} samples", problem, "Restore the data, or begin a new run")

    def _count_steps(self, source: BatchSource, end: float) -> tuple[int, int]:
        """Updates in all, and of an epoch; 0 where nobody knows."""
        if source.count is None:
            return (0 if math.isinf(end) else int(end)), 1
        of_epoch = -(-source.count // source.batch_size)
        left = -(-(source.count - self.position.samples) // source.batch_size)
        return int(min(end, self.step + left + of_epoch * (self.last_epoch - self.epoch - 1))), of_epoch

    def _check_left(self) -> None:
        """Raises JobError: this rank left a loop, and others did not."""
        if self.left:
            self.left = False
            agree_left(self.stops, self.parallel, self.step, self.state.beat)
