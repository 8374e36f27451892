"""Kernels that are deterministic: demanded where a step can do with them, else preferred; trying it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import complete, events, losses, make_job, train

from trainer.errors import WRONG_JOB

TASK, STEPS = "task=digit_tasks:Deterministic", "train.steps=4"
MODES = {
    "single": ["parallel=single"], "dp": ["parallel=dp", "devices_per_node=2"], "ddp": ["devices_per_node=2"],
    "unused": ["devices_per_node=2", "ddp.find_unused_parameters=true"],
    "static": ["devices_per_node=2", "ddp.static_graph=true"], "three": ["devices_per_node=3"],
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_what_is_demanded_depends_on_what_there_is(tmp_path: Path, mode: str) -> None:
    small = [STEPS, *MODES[mode]]
    plain = ["task=digit_tasks:Small", "task_args={dropout: 0.2, batchnorm: true}"]
    wanted = losses(complete(tmp_path / "plain", make_job(*plain, *small)).folder)
    for missing in (False, True):
        keys = ["task_args.missing_after=0"] if missing else []
        run = complete(tmp_path / str(missing), make_job(TASK, *small, *keys))
        assert bool(events(run.folder, "not_deterministic")) == missing
        demanded = run.output(rank=0).count("deterministic kernels alone")
        assert demanded == (1 if missing else 5) * (2 if mode == "dp" else 1)  # one to try it
        if mode != "dp":  # its replicas draw in any order
            assert losses(run.folder) == wanted


def test_an_evaluation_may_use_other_kernels(tmp_path: Path) -> None:
    run = complete(tmp_path, make_job(TASK, STEPS, *MODES["single"], "task_args.missing_in_evaluation=true"))
    assert not events(tmp_path, "not_deterministic")
    assert run.output().count("deterministic kernels alone") == 5


def test_one_that_is_missing_later_is_named(tmp_path: Path) -> None:
    run = train(tmp_path, make_job(TASK, STEPS, *MODES["ddp"], "task_args.missing_after=3"))
    assert run.code == WRONG_JOB
    assert "train.deterministic=True: put_ does not have" in run.output(rank=0)
    assert "Set it to false" in run.output(rank=0)
