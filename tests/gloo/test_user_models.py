"""Models as users have them: modes stay as they were set, all of their state survives, in every mode of parallelism."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from faults import Fault
from ranks import Run, complete, evaluations, events, losses, make_job, train
from states import difference, read_state

from trainer.errors import WRONG_JOB

TASK = "task=model_tasks:Peculiar"
MODES = {
    "single": ["parallel=single"], "dp": ["parallel=dp", "devices_per_node=2"], "ddp": ["devices_per_node=2"],
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_of_an_odd_model_ends_as_a_calm_one(tmp_path: Path, mode: str) -> None:
    """Evaluations come between, the average is kept, and the kill is neither at an evaluation nor at a checkpoint."""
    keys = [TASK, "train.ema_decay=0.8", "train.weight_decay=0", "evaluation.every_steps=4", "train.steps=13",
            "checkpoint.every_steps=3", *MODES[mode]]  # fmt: skip
    if mode == "dp":
        keys += ["task_args.count=96"]  # replicas that compute nothing but one sample
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    first = complete(calm, make_job(*keys))
    assert "NOTE: these parts stay in evaluation mode, as you set them: frozen (BatchNorm2d)" in first.output(0)
    train(killed, make_job(*keys), Fault(8))
    complete(killed, make_job(*keys))
    if mode != "dp":  # its threads share a generator
        assert difference(read_state(calm), read_state(killed)) == ""
        assert losses(calm) == losses(killed) and evaluations(calm)[-1] == evaluations(killed)[-1]
    state = read_state(killed)
    model, average = state["objects"]["model"], state["objects"]["average"]["state"]["model"]
    assert int(state["model"]["frozen.num_batches_tracked"]) == 0 and model["numbers"] == {"": {"count": 13}}
    assert int(state["model"]["norm.num_batches_tracked"]) == 13
    assert float(state["model"]["made"].min()) > 1 and float(model["buffers"]["others"]["calls"]) == 13
    assert not torch.equal(state["model"]["phase"], average["phase"])


def test_a_model_that_arrives_in_evaluation_mode_trains_from_the_first_step(tmp_path: Path) -> None:
    run = complete(tmp_path, make_job(TASK, "task_args.mode=evaluation", "train.steps=2", "devices_per_node=2"))
    assert "NOTE: model() returned the model in evaluation mode" in run.output(0)
    assert [event["message"][:50] for event in events(run.folder, "note")] == [
        "model() returned the model in evaluation mode, as "
    ]
    assert "NOTE" not in run.output(1)
    assert int(read_state(tmp_path)["model"]["frozen.num_batches_tracked"]) == 2


def test_losses_of_half_weights_keep_their_digits(tmp_path: Path) -> None:
    found = {}
    for mode, keys in MODES.items():
        job = make_job(TASK, "task_args.dtype=bfloat16", "train.steps=3", "train.lr=1e-9", *keys)
        run = complete(tmp_path / mode, job)
        found[mode] = losses(tmp_path / mode)
        assert "updates below their 3 digits are lost" in run.output(0)
    for values in found.values():
        assert values == pytest.approx(found["single"], rel=1e-5)
        assert any(float(torch.tensor(value).bfloat16()) != value for value in values)


def test_weights_are_loaded_as_far_as_they_fit(tmp_path: Path) -> None:
    complete(tmp_path / "first", make_job("train.steps=2"))
    weights = {f"net.{name}": value for name, value in read_state(tmp_path / "first")["model"].items()}
    del weights["net.5.bias"]
    torch.save({"state_dict": weights}, tmp_path / "theirs.pt")
    keys = ["train.steps=1", f"checkpoint.load={tmp_path / 'theirs.pt'}", "devices_per_node=2"]
    refused = train(tmp_path / "refused", make_job(*keys))
    assert refused.code == WRONG_JOB
    assert "does not fit the model: it lacks 5.bias. Set checkpoint.strict=false" in refused.output(0)
    taken = complete(tmp_path / "taken", make_job(*keys, "checkpoint.strict=false", "train.lr=1e-9"))
    assert "it lacks 5.bias" in taken.output(0)
    assert torch.allclose(read_state(tmp_path / "taken")["model"]["5.weight"], weights["net.5.weight"])


def test_weights_that_do_not_learn_are_told_or_refused(tmp_path: Path) -> None:
    keys = ["task=model_tasks:Untrained", "parallel=single", "train.steps=4", "evaluation.every_steps=1"]
    run = complete(tmp_path / "detached", make_job(*keys, "task_args.late=false"))
    assert run.output().count("NOTE: no gradient reached first.weight, first.bias in the first step") == 1
    assert run.output().count("NOTE: extra got requires_grad=True after the start") == 1
    run = train(tmp_path / "late", make_job(*keys, "task_args.late=true", "train.ema_decay=0.9"))
    assert run.code == WRONG_JOB
    assert "last.weight, last.bias': the forward pass makes these weights" in run.output()


def test_ranks_that_differ_are_told_and_what_ddp_cannot_do_is_named(tmp_path: Path) -> None:
    keys = ["task=model_tasks:Uneven", "devices_per_node=2", "train.steps=2", "train.lr=0.001"]
    run = complete(tmp_path / "uneven", make_job(*keys))
    assert "NOTE: the ranks hold different values of offset: something beside the optimizer" in run.output(0)
    run = train(tmp_path / "refused", make_job(*keys, "ddp.find_unused_parameters=true"))
    assert run.code == WRONG_JOB and "use_reentrant=False" in run.output(0)


def refuse(folder: Path, *keys: str) -> Run:
    run = train(folder, make_job("task=model_tasks:Narrow", *keys))
    assert run.code == WRONG_JOB and not list(folder.glob("metrics.jsonl"))
    return run


def test_a_batch_norm_that_would_get_one_sample_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = refuse(tmp_path / "single", "parallel=single", "task_args.count=97")
    assert "with 97 samples some batch gives a device a single sample" in run.output()
    refuse(tmp_path / "ddp", "devices_per_node=2", "task_args.count=98")
    refuse(tmp_path / "dp", "parallel=dp", "devices_per_node=2", "task_args.count=98")
    done = complete(tmp_path / "short", make_job("task=model_tasks:Narrow", "task_args.count=97", "train.steps=4"))
    assert done.code == 0 and math.isfinite(losses(done.folder)[-1])
