"""What users return: sums and counts, numbers of all kinds, losses with derivatives, generators of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults import Fault
from muster_runs import muster
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


def test_a_run_whose_data_or_schedule_changed_says_so(tmp_path: Path) -> None:
    keys = ["parallel=single", "train.schedule=cosine"]
    first = train(tmp_path, make_job(*keys, "train.steps=10"))  # two epochs of five steps
    assert first.code == 0
    shorter = train(tmp_path, make_job(*keys, "task_args.count=90", "train.steps=12"))
    assert shorter.code == 0 and sorted(read_state(tmp_path)["position"].values()) == [2, 12, 48]
    told = [event["message"] for event in events(tmp_path, "notice")]
    assert "has 90 samples, and had 101 when the run stopped: the next epoch goes over those" in told[0]
    assert "the learning rate of step 11 is 0.00" in told[1] and "now spans 12 steps" in told[1]
    for count in (40, 91):
        run = train(tmp_path, make_job(*keys, f"task_args.count={count}", "train.steps=12"))
        assert run.code == 64 and "had 90 when the run stopped in the middle of epoch 3" in run.output()
    assert len(events(tmp_path, "notice")) == 2
    complete(tmp_path, make_job(*keys, "task_args.count=90", "train.steps=12"))


def test_a_metric_that_some_batches_lack_is_named(tmp_path: Path) -> None:
    """The epoch before it is not lost."""
    run = train(tmp_path, make_job("task=returning_tasks:Named", "task_args.late=true", "parallel=single"))
    assert run.code == 64 and "task.metrics='more': is missing in some batches" in run.output()
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-000000005"]


def test_sets_have_one_order_in_all_processes(tmp_path: Path) -> None:
    done = muster("run", "small.yaml", "task=returning_tasks:Named", f"runs={tmp_path}", "nodes=2", "train.steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [path.read_text() for path in tmp_path.glob("*/logs/rank-*.log")]
    assert len(logs) == 2 and len({re.findall("order of names.*", log)[0] for log in logs}) == 1


def test_a_model_is_called_as_the_task_says(tmp_path: Path) -> None:
    """By name; and when nobody says so, and the model fails, what would help is named."""
    complete(tmp_path / "usual", make_job("devices_per_node=2"))
    complete(tmp_path / "called", make_job("devices_per_node=2", "task=returning_tasks:Called"))
    assert losses(tmp_path / "called") == losses(tmp_path / "usual")
    run = train(tmp_path / "uncalled", make_job("parallel=single", "task=returning_tasks:Uncalled"))
    assert run.code == 1 and "missing 1 required positional argument: 'labels'" in run.output(0)
    assert "it is called with a whole UserDict" in run.output(0) and "output(model, batch)" in run.output(0)


def test_a_loss_for_batches_of_one_size_is_tried_with_such_a_batch(tmp_path: Path) -> None:
    sizes = "train.batch_size=10", "evaluation.batch_size=37", "train.steps=2"
    complete(tmp_path, make_job("parallel=single", "task=returning_tasks:Whole", *sizes))
