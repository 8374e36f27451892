"""What users return: sums and counts, numbers of all kinds, losses with derivatives, generators of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import Fault
from ranks import complete, evaluations, events, losses, make_job, train
from states import difference, read_state

EXACT = "train.precision=float64"
TOKENS = "task=returning_tasks:Tokens"
JITTERED = "task=returning_tasks:Jittered"


def test_a_mean_over_tokens_is_that_of_a_single_process(tmp_path: Path) -> None:
    """With any number of ranks, replicas and micro-batches, although each has another number of tokens."""
    complete(tmp_path / "single", make_job(TOKENS, EXACT, "parallel=single"))
    expected, ended = losses(tmp_path / "single"), evaluations(tmp_path / "single")[-1]
    assert expected[-1] < 0.9 * expected[0]
    for number, keys in enumerate((
        ["parallel=single", "train.accumulate=4", "task_args.form=batch"],
        ["devices_per_node=2"], ["devices_per_node=3", "train.accumulate=2", "task_args.form=batch"],
        ["parallel=dp", "devices_per_node=3", "task_args.form=batch"],
    )):  # fmt: skip
        folder = tmp_path / str(number)
        complete(folder, make_job(TOKENS, EXACT, *keys))
        assert losses(folder) == pytest.approx(expected, rel=1e-12), keys
        assert evaluations(folder)[-1] == pytest.approx(ended, rel=1e-12), keys
        weights = read_state(tmp_path / "single")["model"]
        for name, weight in read_state(folder)["model"].items():
            assert float((weight - weights[name]).norm()) < 1e-11 * float(weight.norm()), (keys, name)


def test_generators_of_a_datasets_own_are_seeded(tmp_path: Path) -> None:
    """Read by workers or not, killed or not, with any number of ranks."""
    keys = [JITTERED, EXACT, "checkpoint.every_steps=4"]
    noisy = [*keys, "task_args.noise=0.1", "parallel=single"]
    complete(tmp_path / "calm", make_job(*noisy, "data.workers=2"))
    train(tmp_path / "killed", make_job(*noisy), Fault(7))
    run = complete(tmp_path / "killed", make_job(*noisy, "data.workers=1"))
    assert difference(read_state(tmp_path / "calm"), read_state(tmp_path / "killed")) == ""
    assert "WARNING" not in run.output()
    complete(tmp_path / "single", make_job(*keys, "parallel=single"))
    complete(tmp_path / "ranks", make_job(*keys, "devices_per_node=2"))
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "single"), rel=1e-12)
    assert evaluations(tmp_path / "ranks")[-1] == pytest.approx(evaluations(tmp_path / "single")[-1], rel=1e-12)


def test_numbers_of_all_kinds_are_metrics_and_the_trial_leaves_no_trace(tmp_path: Path) -> None:
    complete(tmp_path, make_job("task=returning_tasks:Counting", "parallel=single", "checkpoint.best=array"))
    shown = evaluations(tmp_path)[-1]
    assert shown["tensor"] == shown["array"] > 0
    assert (shown["flag"], shown["7"]) == (1.0, 0.5)
    assert [line["calls"] for line in evaluations(tmp_path)] == [5 * turn for turn in range(1, 6)]
    assert type(read_state(tmp_path)["metrics"]["array"]) is float


@pytest.mark.parametrize("mode", ["parallel=dp devices_per_node=2", "devices_per_node=2"])
def test_a_derivative_by_the_input_is_evaluated(tmp_path: Path, mode: str) -> None:
    complete(tmp_path, make_job("task=returning_tasks:Penalty", *mode.split(), "train.steps=3"))
    assert evaluations(tmp_path)[-1]["loss"] > 0


def test_what_cannot_be_reported_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = train(tmp_path, make_job("devices_per_node=2", "checkpoint.best=acuracy"))
    assert run.code == 64 and "checkpoint.best='acuracy': is not a metric of this task" in run.output(0)
    assert not events(tmp_path, "training")
