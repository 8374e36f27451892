"""What a run that goes on must know of the one that stopped: its data and its schedule may be others now."""

from collections.abc import Callable
from typing import Any

from trainer.checkpoint.training_state import TrainingState
from trainer.config.job import Job
from trainer.data.sampler import Sampler
from trainer.errors import JobError
from trainer.reporting.rank_report import Report


class Continuation:
    """Compares what a checkpoint says of its run with the run that goes on from it."""

    def __init__(self, job: Job, sampler: Sampler, state: TrainingState, report: Report) -> None:
        self.job, self.sampler, self.state, self.report = job, sampler, state, report

    def count_steps(self) -> int:
        """All steps of the training, those done before included."""
        train, position = self.job.train, self.state.position
        epochs = train.epochs or (None if train.steps else 1)
        limits = [] if train.steps is None else [train.steps]
        if epochs is not None:
            steps_of_epoch = -(-position.samples // self.sampler.batch_size)  # done in this one
            left = (epochs - position.epoch) * self.sampler.steps_per_epoch - steps_of_epoch
            limits.append(position.step + max(0, left))
        return min(limits)

    def facts(self, rate: Callable[[int], float]) -> dict[str, Any]:
        """What a checkpoint says of its run; a schedule of the user's may know no step after the last one."""
        return {"samples": self.sampler.count, "next_rate": rate(min(self.state.position.step, self.count_steps() - 1))}

    def check_data(self) -> None:
        """Raises JobError: the data changed in the middle of an epoch."""
        position, count = self.state.position, self.sampler.count
        before = self.state.restored.get("samples", count)
        if before == count and position.samples < count:
            return
        text = f"has {count} samples, and had {before} when the run stopped"
        if position.samples:
            problem = f"{text} in the middle of epoch {position.epoch + 1}: which of them it has used cannot be told"
            remedy = f"Restore the data, or begin a new run with checkpoint.load={self.report.run.checkpoints}/step-..."
            raise JobError("task.train_dataset", f"{count} samples", problem, remedy)
        self.report.notice(f"task.train_dataset {text}: the next epoch goes over those that there are now")

    def announce(self, rate: Callable[[int], float], steps: int) -> None:
        """Say that the learning rate is not the one that the run would have gone on with."""
        step = self.state.position.step
        before, now = self.state.restored.get("next_rate"), rate(step)
        if before is not None and abs(now - before) > 1e-9 * max(now, before) and step < steps:
            self.report.notice(
                f"the learning rate of step {step + 1} is {now:.3g}, not {before:.3g} as when the run stopped: "
                f"train.schedule={self.job.train.schedule} with train.lr={self.job.train.lr:g} now spans {steps} steps"
            )

    def warn(self, irreproducible: str) -> None:
        """Say what a mode cannot promise, and why, if there is anything."""
        step = self.state.position.step
        if irreproducible:
            self.report.note(f"this run is not reproducible: {irreproducible}")
        if irreproducible and step:
            self.report.notice(
                f"the run goes on from step {step}, but not as if it had never stopped: {irreproducible}. It still "
                "uses each sample of an epoch once; its weights will differ"
            )
