"""The three jobs, the modes and the precisions on a real GPU, through the command that people use."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MUSTER = [sys.executable, "-c", "from trainer.launch.cli import main; main()"]


def train(runs: Path, job: str, *overrides: str) -> Path:
    """Run a job to its end on the GPU; return its run folder."""
    name = f"name=gpu{len(list(runs.iterdir())) if runs.exists() else 0}"
    command = [*MUSTER, "run", f"jobs/{job}.yaml", "device=cuda", "devices_per_node=1", f"runs={runs}", name]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = runs.glob(f"{name.removeprefix('name=')}-*")
    return run


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    state: dict[str, torch.Tensor] = torch.load(newest / "model.pt", weights_only=True, map_location="cpu")
    return state


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
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train_losses = [line["loss"] for line in losses if line["kind"] == "train"]
    assert train_losses[-1] < train_losses[0]


def test_two_runs_have_the_same_bits(tmp_path: Path) -> None:
    """`train.deterministic`, by default: cuDNN's quickest kernels for a U-Net add in whatever order they finish."""
    first, second = (train(tmp_path, "segment", "parallel=single", "train.steps=20") for _ in range(2))
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(second)[name]), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["single", "ddp"])
def test_mixed_precision_reaches_the_accuracy(tmp_path: Path, precision: str, mode: str) -> None:
    run = train(tmp_path, "digits", f"parallel={mode}", f"train.precision={precision}")
    assert result(run)["metrics"]["accuracy"] >= 0.97
    assert all(tensor.dtype == torch.float32 for tensor in weights(run).values())


def test_pinned_prefetching_workers_change_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path, "digits", "parallel=single", "train.epochs=2", "data.pin_memory=false")
    pinned = train(tmp_path, "digits", "parallel=single", "train.epochs=2", "data.workers=2", "data.prefetch=4")
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(pinned)[name]), name


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, precision: str) -> None:
    options = ("parallel=ddp", f"train.precision={precision}", "train.epochs=2", "checkpoint.every_steps=7")
    whole = train(tmp_path, "digits", *options)
    run = train(tmp_path, "digits", *options, "train.steps=30", "train.schedule=constant")
    halves = train(tmp_path, "digits", *options, "train.schedule=constant")
    command = [*MUSTER, "run", str(run), "train.steps=46"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, tensor in weights(halves).items():
        assert torch.equal(tensor, weights(run)[name]), name
    assert weights(whole).keys() == weights(run).keys()


def test_data_parallel_over_all_devices_equals_one(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("one GPU: torch.nn.DataParallel refuses a repeated device; covered with one device above")
    one = train(tmp_path, "digits", "parallel=single", "train.steps=20", "log.every_steps=1")
    all_ = train(tmp_path, "digits", "parallel=dp", f"devices_per_node={count}", "train.steps=20", "log.every_steps=1")
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(all_)[name], rtol=1e-3, atol=1e-4), name
    assert len(result(all_)["peak_memory_mb"]) == count
