"""After which steps something follows, by counting steps and samples."""

from __future__ import annotations

from itertools import product

import pytest

from trainer.config.job import Checkpoints, Evaluation, Job
from trainer.data.sampler import Position
from trainer.training.cadence import Cadence

COUNT, STEPS = 22, 17


@pytest.mark.parametrize("evaluate, save, epochs, batch", list(product([None, 3, 4], [None, 2, 5], [1, 2], [4, 5])))
def test_what_follows_a_step(evaluate: int | None, save: int | None, epochs: int, batch: int) -> None:
    job = Job(
        name="due", evaluation=Evaluation(every_steps=evaluate, every_epochs=epochs),
        checkpoint=Checkpoints(every_steps=save),
    )  # fmt: skip
    per_epoch = {4: 6, 5: 5}[batch]
    cadence = Cadence(job, STEPS)
    position, evaluated, saved = Position(), set(), set()
    while position.step < STEPS:
        position = position.after(min(batch, COUNT - position.samples), COUNT)
        assert position.epoch == position.step // per_epoch
        assert position.samples == position.step % per_epoch * batch
        if cadence.evaluation(position):
            evaluated.add(position.step)
        if cadence.checkpoint(position):
            saved.add(position.step)
    multiples = {n: {*range(n, STEPS, n), STEPS} for n in range(1, STEPS)}
    assert evaluated == multiples[epochs * per_epoch] | (multiples[evaluate] if evaluate else set())
    assert saved == multiples[per_epoch] | (multiples[save] if save else set())
