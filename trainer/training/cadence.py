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

    def next_step(self, position: Position) -> int:
        """The first step after `position` that either follows; the last of an epoch always is one."""
        step, left = position.step, self.sampler.count - position.samples
        every = [n for n in (self.job.evaluation.every_steps, self.job.checkpoint.every_steps) if n]
        return min(self.steps, step - (-left // self.sampler.batch_size), *(step - step % n + n for n in every))
