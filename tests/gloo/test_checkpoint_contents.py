"""What a checkpoint holds, who can load it, and which ones are kept."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from muster_runs import muster
from ranks import complete, evaluations, losses, make_job, train
from states import difference, read_state, steps_saved

from trainer.tasks.digits import load_digits

MODES = {
    "single": ["parallel=single"], "dp": ["parallel=dp", "devices_per_node=2"], "ddp": ["devices_per_node=2"],
}  # fmt: skip
KEYS = ["train.precision=float64", "train.ema_decay=0.9"]
HALF = ["train.steps=11", "train.schedule=constant"]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of 11 steps in each mode."""
    root = tmp_path_factory.mktemp("halves")
    return {mode: complete(root / mode, make_job(*KEYS, *HALF, *keys)).folder for mode, keys in MODES.items()}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_continues_a_run_of_every_mode(tmp_path: Path, halves: dict[str, Path], mode: str) -> None:
    complete(tmp_path / "whole", make_job(*KEYS, *MODES["single"], "train.schedule=constant"))
    for other, half in halves.items():
        copy = tmp_path / f"{other} to {mode}"
        shutil.copytree(half, copy)
        complete(copy, make_job(*KEYS, *MODES[mode], "train.schedule=constant"))
        assert losses(copy) == pytest.approx(losses(tmp_path / "whole"), rel=1e-12), (other, mode)


@pytest.mark.parametrize("mode", MODES)
def test_no_prefix_is_written(halves: dict[str, Path], mode: str) -> None:
    """Not for the model, nor anywhere else: neither `module.` of the wrappers nor `_orig_mod.` of the compiler."""
    names = _names(read_state(halves[mode]))
    assert "0.weight" in names
    assert not [name for name in names if "module." in name or "_orig_mod." in name or "vote" in name]


def test_the_configuration_is_there_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a variable held is not: it may be a secret."""
    monkeypatch.setenv("TOKEN", "hunter2")
    job = tmp_path / "job.yaml"
    job.write_text("task: trainer.tasks.digits:Digits\nparallel: single\ndevice: cpu\nname: ${oc.env:TOKEN}\n")
    done = muster("run", job, f"runs={tmp_path}", "train.steps=2")
    assert done.returncode == 0, done.stdout
    [path] = tmp_path.glob("*/checkpoints/step-000000002/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["job"] == "${oc.env:TOKEN}"
    config = manifest["config"]
    assert config["name"] == "${oc.env:TOKEN}" and config["train"]["steps"] == 2


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_others_are_accepted(tmp_path: Path, halves: dict[str, Path], prefix: str) -> None:
    weights = read_state(halves["single"])["model"]
    torch.save({prefix + name: value for name, value in weights.items()}, tmp_path / "theirs.pt")
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "nested.pt")
    found = []
    for file in (tmp_path / "theirs.pt", tmp_path / "nested.pt", halves["single"] / "checkpoints/step-000000011"):
        run = tmp_path / file.stem
        complete(run, make_job("train.steps=1", "train.precision=float64", f"checkpoint.load={file}", *MODES["ddp"]))
        found.append(losses(run))
    assert found[0] == found[1] == found[2]


def test_plain_pytorch_loads_it_in_two_lines(halves: dict[str, Path]) -> None:
    checkpoint = halves["ddp"] / "checkpoints/step-000000011"
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.Identity(), torch.nn.Tanh(), torch.nn.Dropout(0), torch.nn.Flatten(),
        torch.nn.Linear(144, 10),
    ).double()  # fmt: skip
    weights = torch.load(checkpoint / "model.pt", weights_only=True)
    model.load_state_dict(weights)
    average = torch.load(checkpoint / "state.pt", weights_only=True)["objects"]["average"]["state"]["model"]
    model.load_state_dict(average)  # the averaged weights, which are what the run evaluated
    images, labels = load_digits()
    right = model(images[-37:].double()).argmax(1) == labels[-37:]
    assert float(right.double().mean()) == evaluations(halves["ddp"])[-1]["accuracy"]


@pytest.mark.parametrize("keys, scores, best", [
    # Evaluations at 2, 4, 5, 6, 8, 10, 12; checkpoints at 3, 5, 6, 9, 10, 12: the weights of step 8 are not kept.
    (["evaluation.every_steps=2", "train.steps=12"], [1, 2, 4, 3, 9, 1, 1], 5),
    (["evaluation.every_steps=2", "train.steps=12", "checkpoint.best_mode=min"], [7, 7, 4, 3, 1, 3, 3], 6),
    ([], [math.nan, 2, 3, 1, math.nan], 15),  # an undefined metric is never the best
])  # fmt: skip
def test_the_best_is_kept_beside_the_last(tmp_path: Path, keys: list[str], scores: list[float], best: int) -> None:
    listed = "[" + ", ".join("." + str(score) if math.isnan(score) else str(float(score)) for score in scores) + "]"
    job = make_job(
        *MODES["ddp"],
        "task=digit_tasks:Scored",
        f"task_args.scores={listed}",
        "checkpoint.best=score",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=1",
        *keys,
    )
    complete(tmp_path, job)
    assert [repr(values["score"]) for values in evaluations(tmp_path)] == [repr(float(score)) for score in scores]
    assert steps_saved(tmp_path) == [best, job.train.steps]


def test_a_best_metric_that_does_not_exist_is_named(tmp_path: Path) -> None:
    run = train(tmp_path, make_job(*MODES["ddp"], "checkpoint.best=acuracy"))
    assert 64 in run.codes
    assert "checkpoint.best='acuracy': is not a metric of this task" in run.output(0)
    assert "loss, accuracy" in run.output(0)


def test_nothing_differs_between_world_sizes(halves: dict[str, Path]) -> None:
    """The checkpoint of DDP is that of a single process, key by key."""
    single, ddp = read_state(halves["single"]), read_state(halves["ddp"])
    assert list(single) == list(ddp)
    assert _names(single) == _names(ddp)
    for key in ("position", "evaluated"):
        assert difference(single[key], ddp[key]) == ""


def _names(state: object) -> list[str]:
    if not isinstance(state, dict):
        return []
    return [str(key) for key in state] + [name for value in state.values() for name in _names(value)]
