"""A model in shards on a real GPU: the training of DDP, killed, too large to be built twice, and exported."""

import subprocess
import sysconfig
from pathlib import Path
from statistics import median

import pytest
from gpu_runs import ENVIRONMENT, MUSTER, all_gpus, losses, result, train, train_killed
from paths import ROOT
from states import difference, read_state

from trainer.records import read_lines
from trainer.run.folder import RunFolder


@pytest.mark.parametrize("option", ["fsdp.gather=full", "fsdp.gather=half", "train.checkpoint_activations=true"])
def test_shards_on_one_gpu_are_the_training_of_ddp(tmp_path: Path, option: str) -> None:
    options = ("train.precision=bf16", "train.steps=20", "log.every_steps=1")
    plain = train(tmp_path, "bytelm", "parallel=ddp", *options)
    run = train(tmp_path, "bytelm", "parallel=fsdp", "fsdp.min_params=1", *options, option)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-2)


def test_shards_on_all_gpus_are_loaded_on_one_and_exported(tmp_path: Path) -> None:
    """A model of 124 million weights, which one rank builds for all; nothing of the export needs the GPU."""
    options = ("task_args.size=124m", "train.precision=bf16", "train.batch_size=8", "log.every_steps=1",
               "train.schedule=constant")  # fmt: skip
    run = train(tmp_path, "bytelm", "parallel=fsdp", all_gpus(1), *options, "train.steps=3")
    words = [*MUSTER, "run", str(run), "train.steps=4", "parallel=single", "devices_per_node=1"]
    subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=400)
    assert len(losses(run)) == 4
    target = tmp_path / "model.safetensors"
    blind = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*MUSTER, "export", str(run), str(target)], cwd=ROOT, env=blind, check=True, timeout=400)
    assert target.stat().st_size > 4 * 100_000_000


def test_killed_in_shards_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = ("parallel=fsdp", "fsdp.min_params=1", "train.precision=bf16", "train.steps=60", "train.batch_size=8",
               "checkpoint.every_steps=7", "task_args.size=10m")  # fmt: skip
    calm, run = train(tmp_path, "bytelm", *options), train_killed(tmp_path, "bytelm", *options)
    [resume] = [event for event in RunFolder(run).read_events() if event["event"] == "resume"]
    assert resume["folder"] == "memory"
    assert difference(read_state(calm)["model"], read_state(run)["model"]) == ""


def test_the_largest_model_is_built_layer_by_layer(tmp_path: Path) -> None:
    """1.5 billion weights: with gradients and moments 22 GiB. Nothing holds the model whole beside its shards."""
    folder = Path(sysconfig.get_path("stdlib"), "email")
    run = train(tmp_path, "bytelm", "task_args.size=1.5b", f"task_args.folder={folder}", "parallel=fsdp",
                "train.precision=bf16", "train.batch_size=2", "train.checkpoint_activations=true", "train.steps=4",
                "log.every_steps=1", "evaluation.batch_size=8", "checkpoint.in_memory=false",
                "train.lr=0.0001")  # fmt: skip
    assert losses(run)[-1] < losses(run)[0]
    assert 22_000 < result(run)["peak_memory_mb"][0]["peak_mb"] < 30_000


@pytest.mark.speed
def test_shards_on_one_gpu_cost_what_ddp_costs(tmp_path: Path) -> None:
    """With batches that keep the GPU busy for longer than the Python of `fully_shard` takes."""
    options = ("task_args.size=124m", "train.precision=bf16", "train.batch_size=64", "train.steps=120",
               "log.every_steps=20", "checkpoint.every_steps=1000")  # fmt: skip
    speeds: dict[str, list[float]] = {"ddp": [], "fsdp": []}
    for mode in ("ddp", "fsdp", "fsdp", "ddp"):
        lines = read_lines(train(tmp_path, "bytelm", f"parallel={mode}", *options) / "metrics.jsonl")
        speeds[mode] += [line["samples_per_s"] for line in lines if line["kind"] == "train"][1:]
    assert median(speeds["fsdp"]) >= median(speeds["ddp"]) / 1.03
