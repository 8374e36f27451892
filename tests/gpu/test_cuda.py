"""The three jobs, the modes and the precisions on a real GPU, through the command that people use."""

import subprocess
from pathlib import Path

import pytest
import torch
from gpu_runs import ENVIRONMENT, MUSTER, all_gpus, command, losses, result, same_bits, train, train_killed, weights
from paths import ROOT
from stopwatch import Stopwatch

from trainer.run.folder import RunFolder


@pytest.mark.parametrize("mode", ["single", "dp", "ddp"])
def test_the_main_job_reaches_its_accuracy_in_every_mode(tmp_path: Path, mode: str) -> None:
    found = result(train(tmp_path, "digits", f"parallel={mode}"))
    assert found["device"] == "cuda"
    assert found["metrics"]["accuracy"] >= 0.975
    assert found["peak_memory_mb"][0]["device"] == "cuda:0"
    assert found["peak_memory_mb"][0]["peak_mb"] > 0


@pytest.mark.parametrize("job", ["segment", "bytelm"])
def test_the_other_jobs_train(tmp_path: Path, job: str) -> None:
    run = train(tmp_path, job, "parallel=ddp", "train.steps=20", "log.every_steps=1")
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("job, precision", [("segment", "float32"), ("bytelm", "float32"), ("bytelm", "bf16")])
def test_two_runs_have_the_same_bits(tmp_path: Path, job: str, precision: str) -> None:
    """`train.deterministic`, by default: the quickest kernels of U-Nets and attention add in any order."""
    options = ("parallel=single", "train.steps=20", f"train.precision={precision}")
    first, second = (train(tmp_path, job, *options) for _ in range(2))
    same_bits(first, second)


@pytest.mark.parametrize("gpus", [1, 2])
def test_killed_it_ends_with_the_same_bits(tmp_path: Path, gpus: int) -> None:
    options = ["parallel=ddp", "train.steps=60", "checkpoint.every_steps=7", "train.precision=bf16"]
    options += [all_gpus()] if gpus > 1 else []
    calm = train(tmp_path, "segment", *options)
    run = train_killed(tmp_path, "segment", *options, rank=gpus - 1)
    [resume] = [event for event in RunFolder(run).read_events() if event["event"] == "resume"]
    assert resume["folder"] == "memory"
    same_bits(calm, run)


@pytest.mark.parametrize("option", ["train.compile=true", "train.ema_decay=0.9", "train.channels_last=true"])
def test_an_option_changes_no_more_than_digits(tmp_path: Path, option: str) -> None:
    options = ("train.steps=20", "log.every_steps=1", "parallel=ddp")
    plain, run = train(tmp_path, "segment", *options), train(tmp_path, "segment", *options, option)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-2)


@pytest.mark.parametrize("option", [
    "ddp.compression=none", "ddp.compression=bf16", "ddp.compression=fp16", "ddp.compression=powersgd",
    "ddp.sync_every=4", "ddp.static_graph=true", "ddp.sync_batchnorm=true",
])  # fmt: skip
def test_ranks_on_all_gpus(tmp_path: Path, option: str) -> None:
    """Through NCCL; with more than two its buckets are settled first."""
    options = ("train.steps=40", "log.every_steps=1", "parallel=ddp", all_gpus())
    task = ["task=gpu_tasks:Normed"] if "batchnorm" in option else []
    run = train(tmp_path, "digits", *options, *task, option)
    assert losses(run)[-1] < losses(run)[0]
    assert len(result(run)["peak_memory_mb"]) == torch.cuda.device_count()


def test_a_rank_that_raises_ends_the_run_at_once(tmp_path: Path, stopwatch: Stopwatch) -> None:
    """Its peers wait for it inside NCCL, which it must not wait for in turn."""
    words, _ = command(tmp_path, "digits", "parallel=ddp", "task=gpu_tasks:Raising", all_gpus())
    with stopwatch.at_most(60):
        done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 64 and "task_args.raising=1: on purpose" in done.stdout + done.stderr


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["single", "ddp"])
def test_mixed_precision_reaches_the_accuracy(tmp_path: Path, precision: str, mode: str) -> None:
    run = train(tmp_path, "digits", f"parallel={mode}", f"train.precision={precision}")
    assert result(run)["metrics"]["accuracy"] >= 0.97
    assert all(tensor.dtype == torch.float32 for tensor in weights(run).values())


def test_pinned_prefetching_workers_change_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path, "digits", "parallel=single", "train.epochs=2", "data.pin_memory=false")
    pinned = train(tmp_path, "digits", "parallel=single", "train.epochs=2", "data.workers=2", "data.prefetch=4")
    same_bits(plain, pinned)


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, precision: str) -> None:
    options = ("parallel=ddp", f"train.precision={precision}", "train.epochs=2", "checkpoint.every_steps=7")
    whole = train(tmp_path, "digits", *options)
    run = train(tmp_path, "digits", *options, "train.steps=30", "train.schedule=constant")
    halves = train(tmp_path, "digits", *options, "train.schedule=constant")
    words = [*MUSTER, "run", str(run), "train.steps=46"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    same_bits(halves, run)
    assert weights(whole).keys() == weights(run).keys()


def test_data_parallel_over_all_devices_equals_one(tmp_path: Path) -> None:
    devices = all_gpus()
    one = train(tmp_path, "digits", "parallel=single", "train.steps=20", "log.every_steps=1")
    all_ = train(tmp_path, "digits", "parallel=dp", devices, "train.steps=20", "log.every_steps=1")
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(all_)[name], rtol=1e-3, atol=1e-4), name
    assert len(result(all_)["peak_memory_mb"]) == torch.cuda.device_count()
