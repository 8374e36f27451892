"""After which steps an evaluation and a checkpoint follow."""

from dataclasses import dataclass

from trainer.config.job import Job
from trainer.data.sampler import Position


@dataclass(frozen=True)
class Cadence:
    """A function of job and position alone, so all ranks agree."""

    job: Job
    steps: int
    """Of the whole training."""

    def evaluation(self, position: Position) -> bool:
        """Whether an evaluation follows."""
        every = self.job.evaluation.every_steps
        return (
            position.step >= self.steps
            or bool(every and position.step % every == 0)
            or (not position.samples and position.epoch % self.job.evaluation.every_epochs == 0)
        )

    def checkpoint(self, position: Position) -> bool:
        """Whether a checkpoint follows."""
        every = self.job.checkpoint.every_steps
        return position.step >= self.steps or not position.samples or bool(every and position.step % every == 0)
