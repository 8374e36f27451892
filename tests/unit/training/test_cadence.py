"""The next step that something follows, against looking at each step."""

from __future__ import annotations

from itertools import product

import pytest

from trainer.config.job import Checkpoints, Evaluation, Job
from trainer.data.sampler import Position, Sampler
from trainer.training.cadence import Cadence


@pytest.mark.parametrize("evaluate, save, epochs, batch", list(product([None, 3, 4], [None, 2, 5], [1, 2], [4, 5])))
def test_the_next_step_is_the_first_that_anything_follows(
    evaluate: int | None, save: int | None, epochs: int, batch: int
) -> None:
    job = Job(
        name="due", evaluation=Evaluation(every_steps=evaluate, every_epochs=epochs),
        checkpoint=Checkpoints(every_steps=save),
    )  # fmt: skip
    order, steps = Sampler(count=22, batch_size=batch, accumulate=1, rank=0, world_size=1, seed=0), 17
    due, positions = Cadence(job, order, steps), [Position()]
    while positions[-1].step < steps:
        last = positions[-1]
        samples = min(last.samples + batch, order.count) % order.count
        positions.append(Position(last.step + 1, last.epoch + (not samples), samples))
    followed = [at.step for at in positions[1:] if due.evaluation(at) or due.checkpoint(at)]
    for at in positions[:-1]:
        assert due.next_step(at) == min(step for step in followed if step > at.step)
