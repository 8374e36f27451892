"""The boundary between two batches, for tasks and for scripts: seeds, stops, states in memory and on disk."""

from collections.abc import Callable
from typing import NoReturn

from trainer.checkpoint.savable import check_savable
from trainer.checkpoint.training_state import TrainingState
from trainer.config.job import Job
from trainer.data.generators import Generators, seed_own
from trainer.data.rng import STEPS, derive_step_seed, seed_generators
from trainer.errors import JobError, Stopped
from trainer.parallel.base import Parallel
from trainer.parallel.stops import Stops
from trainer.reporting.rank_report import Report
from trainer.training.finite_loss import LossCheck


class Boundary:
    """What a training does between two batches, whoever computes them."""

    def __init__(
        self, job: Job, parallel: Parallel, report: Report,
        explain: Callable[[str, str, Exception], JobError] | None = None,
    ) -> None:  # fmt: skip
        """`explain`: see `TrackedObjects`."""
        self.job, self.parallel, self.report = job, parallel, report
        self.state = TrainingState(job, parallel, report, explain)
        self.position = self.state.position
        self.stops = Stops(parallel.rank, parallel.world_size, self.state.beat)
        self.loss_check = LossCheck(job.train.on_nan, report)
        self.own_generators: Generators = {}
        """Generators of the user's own, which are seeded with the rest."""
        self.stopped = False
        self.tried = False
        """Whether it is known that a checkpoint can hold all that is tracked."""

    def seed_generators(self, number: int, stream: bytes = STEPS) -> None:
        """Seed all generators for what is computed at the current position, so none is ever saved."""
        value = derive_step_seed(self.job.seed, self.position.step, number, stream)
        seed_generators(value, self.parallel.devices)
        if self.own_generators:
            seed_own(self.own_generators, value)

    def try_savable(self) -> None:
        """A first step is done, so optimizers have a state. Raises JobError: a checkpoint could not hold it."""
        if not self.tried:
            check_savable(self.state.contents(), script=self.job.script is not None)
            self.tried = True

    def save(self, wait: bool) -> None:
        """Commit a checkpoint, beside the training or at once."""
        self.loss_check.read_deferred()
        try:
            self.state.save(wait)
        except Exception:  # perhaps because of what became part of the state after it was tried
            check_savable(self.state.contents(), script=self.job.script is not None)
            raise

    def save_and_stop(self) -> NoReturn:
        """Commit a checkpoint and end with the exit code that asks for a requeue."""
        self.save(wait=True)
        self.report.event("stopped", step=self.position.step)
        self.stopped = True
        raise Stopped
