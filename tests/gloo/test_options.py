"""The options of a training: each does what it says, the same in every mode, and survives a resume."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from faults import Fault
from ranks import complete, evaluations, events, losses, make_job, train
from states import difference, read_state, steps_saved

MODES = {
    "single": ["parallel=single"], "dp": ["parallel=dp", "devices_per_node=3"], "ddp": ["devices_per_node=2"],
}  # fmt: skip
EXACT = "train.precision=float64"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No option, one process."""
    return complete(tmp_path_factory.mktemp("plain"), make_job(EXACT, *MODES["single"])).folder


CHANGING = (
    "train.clip_norm=0.5", "train.schedule=linear", "train.optimizer_args={betas: [0.8, 0.9]}",
    "train.optimizer=schedules:lion", "train.schedule=schedules:steps",
)  # fmt: skip


@pytest.mark.parametrize("options", [
    (*CHANGING[:3], "train.channels_last=true", "train.ema_decay=0.8"), CHANGING[3:],
])  # fmt: skip
def test_it_is_the_same_in_every_mode(tmp_path: Path, options: tuple[str, ...]) -> None:
    for mode, keys in MODES.items():
        complete(tmp_path / mode, make_job(EXACT, *options, *keys))
        assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / "single"), rel=1e-12), mode
        ours, theirs = evaluations(tmp_path / mode)[-1], evaluations(tmp_path / "single")[-1]
        assert ours == pytest.approx(theirs, rel=1e-12), mode


@pytest.mark.parametrize("option", [*CHANGING, "train.channels_last=true", "train.ema_decay=0.8"])
def test_each_does_something_else(tmp_path: Path, plain: Path, option: str) -> None:
    complete(tmp_path, make_job(EXACT, option, *MODES["single"]))
    changed = losses(tmp_path) != pytest.approx(losses(plain), rel=1e-6)
    assert changed == (option in CHANGING)


def test_clipping_bounds_the_whole_gradient(tmp_path: Path) -> None:
    """Plain SGD at rate 1 moves the weights by just the norm."""
    complete(
        tmp_path,
        make_job(
            EXACT,
            *MODES["ddp"],
            "train.optimizer=sgd",
            "train.lr=1",
            "train.schedule=constant",
            "train.weight_decay=0",
            "train.warmup_steps=0",
            "train.clip_norm=0.001",
            "checkpoint.every_steps=1",
            "checkpoint.keep_last=99",
        ),
    )
    before, after = read_state(tmp_path, 6)["model"], read_state(tmp_path, 7)["model"]
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float(moved.norm()) == pytest.approx(0.001, rel=1e-5)


def test_the_moving_average_is_one_and_survives_a_resume(tmp_path: Path) -> None:
    keys = [EXACT, "train.ema_decay=0.8", "checkpoint.every_steps=1", "checkpoint.keep_last=99", *MODES["ddp"]]
    complete(tmp_path / "uninterrupted", make_job(*keys))
    train(tmp_path / "run", make_job(*keys), Fault(8))
    complete(tmp_path / "run", make_job(*keys))
    assert difference(read_state(tmp_path / "uninterrupted"), read_state(tmp_path / "run")) == ""
    weights = [read_state(tmp_path / "run", step)["model"]["5.weight"] for step in range(1, 22)]
    average = weights[0]
    for weight in weights[1:]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(
        read_state(tmp_path / "run")["objects"]["average"]["state"]["model"]["5.weight"], average
    )


def test_bf16_trains_nearly_the_same(tmp_path: Path) -> None:
    keys = ["train.steps=40", "task_args.held_out=200"]
    complete(tmp_path / "float32", make_job(*MODES["single"], *keys))
    final = evaluations(tmp_path / "float32")[-1]["loss"]
    for mode, mode_keys in MODES.items():
        complete(tmp_path / mode, make_job(*mode_keys, *keys, "train.precision=bf16"))
        assert losses(tmp_path / mode) != losses(tmp_path / "float32")
        assert evaluations(tmp_path / mode)[-1]["loss"] == pytest.approx(final, rel=0.02)
        assert read_state(tmp_path / mode)["model"]["0.weight"].dtype == torch.float32


def test_compiled_it_is_the_same_and_no_name_changes(tmp_path: Path) -> None:
    keys = ["task=digit_tasks:Compiled", "train.steps=4", "task_args.held_out=8", "parallel=ddp"]
    complete(tmp_path / "plain", make_job(*keys))
    run = train(tmp_path / "compiled", make_job(*keys, "train.compile=true"), timeout_s=250)  # 10 s of g++
    assert run.code == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert [evaluations(tmp_path / run)[-1]["graphs"] > 0 for run in ("plain", "compiled")] == [False, True]
    assert list(read_state(tmp_path / "compiled")["model"]) == list(read_state(tmp_path / "plain")["model"])


@pytest.mark.parametrize("span, steps", [("[1, 1]", 1), ("[4, 6]", 3), ("[20, 30]", 2)])
def test_the_profiler_traces_the_steps_that_are_named(tmp_path: Path, span: str, steps: int) -> None:
    complete(tmp_path, make_job(*MODES["ddp"], f"log.profile_steps={span}", "evaluation.every_epochs=9"))
    for rank in (0, 1):
        trace = json.loads((tmp_path / f"profile/rank{rank}.json").read_text())["traceEvents"]
        names = [event.get("name", "") for event in trace]
        assert sum(name.startswith("Optimizer.step") for name in names) == steps
        assert "aten::convolution_backward" in names


def test_a_trace_that_a_stop_cuts_short_is_written(tmp_path: Path) -> None:
    assert (
        train(tmp_path, make_job(*MODES["ddp"], "log.profile_steps=[2,20]"), Fault(5, number=signal.SIGTERM)).code == 75
    )
    assert (tmp_path / "profile/rank0.json").is_file()


@pytest.mark.parametrize("killed_after", [3, 8])
def test_tensorboard_shows_what_metrics_say_across_a_restart(tmp_path: Path, killed_after: int) -> None:
    """What a killed attempt wrote beyond its checkpoint, or before its first, is not shown twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(*MODES["single"], "log.tensorboard=true")
    train(tmp_path, job, Fault(killed_after))
    complete(tmp_path, job)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    shown = {scalar.step: scalar.value for scalar in board.Scalars("train/loss")}
    assert list(shown.values()) == pytest.approx(losses(tmp_path))
    assert len(board.Scalars("train/loss")) == 21
    assert [scalar.step for scalar in board.Scalars("evaluation/accuracy")] == [5, 10, 15, 20, 21]


POISON = ["task=digit_tasks:Poisoned", "task_args.index=7"]


@pytest.mark.parametrize("mode", ["single", "ddp"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_halts_all_ranks(tmp_path: Path, mode: str, value: str) -> None:
    """In epoch 2; it is known at once, on every rank, and no checkpoint is made of it."""
    keys = [*POISON, f"task_args={{first: 6, last: 10, value: {value}}}", "checkpoint.every_steps=1"]
    run = train(tmp_path, make_job(*keys, *MODES[mode]))
    assert run.code == 1
    found = events(tmp_path, "nonfinite_loss")
    assert sorted(event["rank"] for event in found) == list(range(len(run.codes)))
    (step,) = {event["step"] for event in found}
    assert 6 <= step <= 10
    assert steps_saved(tmp_path)[-1] == step - 1
    (culprit,) = [event["rank"] for event in found if 7 in event["samples"]]
    assert f"NonFiniteLoss: the loss of step {step} is " in run.output(culprit)
    assert "train.on_nan=skip" in run.output(culprit)


@pytest.mark.parametrize("mode", ["single", "ddp"])
def test_a_loss_that_is_not_finite_is_skipped_on_all_ranks(tmp_path: Path, mode: str) -> None:
    keys = [EXACT, *POISON, "task_args={first: 6, last: 10}", "train.on_nan=skip"]
    complete(tmp_path, make_job(*keys, *MODES[mode]))
    found = losses(tmp_path)
    assert sum(loss != loss for loss in found) == 1
    complete(tmp_path / "single", make_job(*keys, *MODES["single"]))
    assert found == pytest.approx(losses(tmp_path / "single"), rel=1e-12, nan_ok=True)
    assert found[-1] < 0.7 * found[0]
    assert all(value.isfinite().all() for value in read_state(tmp_path)["model"].values())


@pytest.mark.parametrize("mode", ["single", "ddp"])
def test_a_stop_in_the_step_of_a_nan_saves_nothing_of_it(tmp_path: Path, mode: str) -> None:
    keys = "task_args={first: 6, last: 10, stops: true}", "evaluation.every_epochs=9"
    run = train(tmp_path, make_job(*POISON, *keys, *MODES[mode]))
    assert run.code == 1
    assert len(events(tmp_path, "nonfinite_loss")) == len(run.codes)
    assert steps_saved(tmp_path) == [5]
