"""After which steps an evaluation and a checkpoint follow: of the job and the position alone, so all ranks agree."""

from dataclasses import dataclass

from trainer.config.job import Job
from trainer.data.sampler import Position, Sampler


@dataclass(frozen=True)
class Cadence:
    """What the job asks for at a position that a step has reached."""

    job: Job
    sampler: Sampler
    steps: int
    """Of the whole training."""

    def evaluation(self, position: Position) -> bool:
        """Whether an evaluation follows."""
        every = self.job.evaluation.every_steps
        epochs = -(-position.step // self.sampler.steps_per_epoch)
        return (
            position.step >= self.steps
            or bool(every and position.step % every == 0)
            or (not position.samples and epochs % self.job.evaluation.every_epochs == 0)
        )

    def checkpoint(self, position: Position) -> bool:
        """Whether a checkpoint follows."""
        every = self.job.checkpoint.every_steps
        return position.step >= self.steps or not position.samples or bool(every and position.step % every == 0)
