"""A model in stages: killed and resumed bit by bit, at another number of stages and in other modes; what it refuses."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults import Fault
from muster_runs import FULL, kill, result, submitted
from ranks import complete, evaluations, events, losses, make_job, order_of_samples, train
from states import difference, read_state

from trainer.errors import WRONG_JOB

PIPELINE = ["parallel=pipeline", "devices_per_node=2"]
PAIR = ["parallel=pipeline", "devices_per_node=4", "pipeline.stages=2"]
WAYS = [
    PIPELINE, ["parallel=single"], PAIR, ["parallel=fsdp", "devices_per_node=2", "fsdp.min_params=100"],
    ["parallel=pipeline", "devices_per_node=3", "pipeline.schedule=gpipe", "pipeline.microbatches=4"],
]  # fmt: skip


@pytest.mark.parametrize("mode", [PIPELINE, PAIR] if FULL else [PAIR])
def test_kill_and_resume(tmp_path: Path, mode: list[str]) -> None:
    keys = [*mode, "task_args.dropout=0.3", "checkpoint.every_steps=1", "train.clip_norm=0.5", "train.accumulate=2"]
    keys += [] if FULL else ["train.steps=12"]
    complete(tmp_path / "calm", make_job(*keys))
    for step in range(1, 21) if FULL else [10]:
        folder, job = tmp_path / f"{step}", make_job(*keys)
        rank = step % job.world_size
        assert train(folder, job, Fault(step, rank=rank)).codes[rank] == -signal.SIGKILL
        complete(folder, job)
        assert step - 1 <= events(folder, "training")[-1]["step"] <= step
        assert difference(read_state(tmp_path / "calm"), read_state(folder)) == ""
        assert losses(folder) == losses(tmp_path / "calm")
        assert evaluations(folder)[-1] == evaluations(tmp_path / "calm")[-1]
        assert order_of_samples(folder) == order_of_samples(tmp_path / "calm")


def test_each_mode_goes_on_from_the_others_checkpoints(tmp_path: Path) -> None:
    """With a mean over tokens, of which the last micro-batches have others than the first, and some none."""
    keys = ["task=returning_tasks:Tokens", "task_args.form=batch", "train.precision=float64", "train.clip_norm=0.1"]
    complete(tmp_path / "single", make_job(*keys, "parallel=single"))
    for number, way in enumerate(WAYS):
        last = number == len(WAYS) - 1
        steps = [] if last else [f"train.steps={4 * (number + 1)}", "train.schedule=constant"]
        run = complete(tmp_path / "run", make_job(*keys, "train.schedule=constant", *way, *steps))
    complete(tmp_path / "constant", make_job(*keys, "train.schedule=constant", "parallel=single"))
    assert [event["step"] for event in events(tmp_path / "run", "training")] == [0, 4, 8, 12, 16], run.output(0)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "constant"), rel=1e-12)
    assert evaluations(tmp_path / "run")[-1] == pytest.approx(evaluations(tmp_path / "constant")[-1], rel=1e-12)
    assert order_of_samples(tmp_path / "run") == order_of_samples(tmp_path / "constant")
    ours, expected = read_state(tmp_path / "run"), read_state(tmp_path / "constant")
    assert list(ours["model"]) == list(expected["model"])
    optimizer, other = (state["objects"]["optimizer"]["state"] for state in (ours, expected))
    assert optimizer["param_groups"] == other["param_groups"] and list(optimizer["state"]) == list(other["state"])


def test_stages_may_share_weights_and_the_last_one_make_anything(tmp_path: Path) -> None:
    """Such as a dictionary, which is cut like a batch where an epoch ends; in two pipelines, each weight is one."""
    keys = ["task=digit_tasks:Labelled", "train.steps=6", "train.precision=float64", "train.clip_norm=0.5"]
    complete(tmp_path / "single", make_job(*keys, "parallel=single"))
    complete(tmp_path / "stages", make_job(*keys, *PAIR))
    assert losses(tmp_path / "stages") == pytest.approx(losses(tmp_path / "single"), rel=1e-12)
    weights = read_state(tmp_path / "single")["model"]
    for name, weight in read_state(tmp_path / "stages")["model"].items():
        assert float((weight - weights[name]).norm()) < 1e-11 * float(weight.norm()), name
    assert evaluations(tmp_path / "stages")[-1] == pytest.approx(evaluations(tmp_path / "single")[-1], rel=1e-12)


def test_under_agents(tmp_path: Path) -> None:
    """A killed rank: the next attempt goes on from the newest checkpoint, and the run says beforehand that it will."""
    keys = ["parallel=pipeline", "nodes=2", "devices_per_node=1", "task_args.step_s=0.004", "train.steps=60"]
    with submitted(tmp_path, *keys) as run:
        run.wait("checkpoint", 2)
        kill(run.ranks()[1])
        assert result(run, 120) == 0, run.log("node-0.log")
        assert run.events("resume")[-1]["folder"].startswith("step-")
        assert "checkpoint.every_steps" in run.events("notice")[0]["message"]


def test_batches_of_another_size_are_refused(tmp_path: Path) -> None:
    """Nothing is learned of what does not fit into the next stage's buffer, even where no gradient tells it."""
    run = train(tmp_path, make_job(*PIPELINE, "task=digit_tasks:Ragged"))
    assert run.codes[0] == WRONG_JOB and run.codes[1] not in (0, -signal.SIGABRT), run.output()
    words = ["parallel='pipeline'", "float32 [12, 4, 8, 7]", "float32 [12, 4, 8, 8]", "Pad all samples to one size"]
    assert all(word in run.output(0) for word in words), run.output(0)


@pytest.mark.parametrize("keys, words", [
    (["task_args.batchnorm=true"], ["task.model='BatchNorm2d'", "single micro-batches", "GroupNorm"]),
    (["task=digit_tasks:Tied"], ["parallel='pipeline'", "Autoencoder", "stages(model)"]),
])  # fmt: skip
def test_what_it_refuses(tmp_path: Path, keys: list[str], words: list[str]) -> None:
    run = train(tmp_path, make_job(*PIPELINE, *keys))
    assert run.code == WRONG_JOB
    assert all(word in run.output(1) for word in words), run.output(1)
