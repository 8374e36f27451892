"""Deterministic kernels: an operation that has none ends a step of training, not an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import complete, losses, make_job, train

from trainer.errors import WRONG_JOB

TASK, STEPS = "task=digit_tasks:Deterministic", "train.steps=4"
MODES = {"single": ["parallel=single"], "dp": ["parallel=dp", "devices_per_node=2"], "ddp": ["devices_per_node=2"]}


@pytest.mark.parametrize("mode", ["single", "ddp"])
def test_they_change_nothing_else(tmp_path: Path, mode: str) -> None:
    """Evaluations may use others."""
    keys = [STEPS, *MODES[mode]]
    plain = complete(tmp_path / "plain", make_job("task_args={dropout: 0.2, batchnorm: true}", *keys))
    demanding = complete(tmp_path / "demanding", make_job(TASK, *keys, "task_args.missing_in_evaluation=true"))
    assert losses(demanding.folder) == losses(plain.folder)


@pytest.mark.parametrize("mode", MODES)
def test_one_that_is_missing_is_named(tmp_path: Path, mode: str) -> None:
    run = train(tmp_path, make_job(TASK, STEPS, *MODES[mode], "task_args.missing_after=3"))
    assert run.code == WRONG_JOB
    assert "train.deterministic=True: put_ does not have" in run.output(rank=0)
    assert "Set it to warn" in run.output(rank=0)
