"""One job file, one training: every mode gives the same losses, step by step, and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from muster_runs import FULL
from ranks import complete, losses, make_job, order_of_samples
from torch import Tensor

MODES = {
    "accumulate 4": ["train.accumulate=4"],
    "dp 2": ["parallel=dp", "devices_per_node=2"],
    "dp 3": ["parallel=dp", "devices_per_node=3"],
    "dp 2, accumulate 4": ["parallel=dp", "devices_per_node=2", "train.accumulate=4"],
    "ddp 2": ["devices_per_node=2"],
    "ddp 2, accumulate 4": ["devices_per_node=2", "train.accumulate=4"],
    "ddp 4": ["devices_per_node=4"],
    "ddp on 2 nodes": ["nodes=2"],
    "pipeline 4, gpipe": ["parallel=pipeline", "devices_per_node=4", "pipeline.schedule=gpipe"],
    "2 pipelines of 2, accumulate 2": [
        "parallel=pipeline",
        "devices_per_node=4",
        "pipeline.stages=2",
        "train.accumulate=2",
    ],
    "server 3, accumulate 4": ["parallel=server", "devices_per_node=3", "train.accumulate=4"],
}
STEPS = 50
COUNTS = {"whole batches": 96, "a batch of 5": 101, "a batch of 1": 97}
"""Of samples, in batches of 24: the last batch of an epoch; of 1 it leaves all ranks but one without a sample."""


def modes_for(precision: str, count: str) -> list[str]:
    """All of them with batches that do not divide; unless FULL, a few with what is a special case of that."""
    if FULL or (precision, count) == ("float64", "a batch of 5"):
        return list(MODES)
    return {
        "a batch of 1": [
            "dp 3",
            "ddp 2, accumulate 4",
            "ddp 4",
            "server 3, accumulate 4",
            "2 pipelines of 2, accumulate 2",
        ],
        "whole batches": ["dp 2, accumulate 4", "ddp 2"],
        "a batch of 5": ["accumulate 4", "dp 2", "ddp 2"],
    }[count]


def relative_difference(some: list[float], others: list[float]) -> float:
    """The largest."""
    assert len(some) == len(others) == STEPS
    return max(abs(a - b) / abs(a) for a, b in zip(some, others, strict=True))


def weights(folder: Path) -> dict[str, Tensor]:
    """Of the last checkpoint."""
    state: dict[str, Tensor] = torch.load(folder / f"checkpoints/step-{STEPS:09d}/model.pt", weights_only=True)
    return state


@pytest.mark.parametrize("precision, count, limit", [
    ("float64", "whole batches", 1e-12), ("float64", "a batch of 5", 1e-12), ("float64", "a batch of 1", 1e-12),
    ("float32", "a batch of 5", 1e-5),
])  # fmt: skip
def test_every_mode_gives_the_losses_of_a_single_process(
    tmp_path: Path, precision: str, count: str, limit: float
) -> None:
    common = [f"train.precision={precision}", f"task_args.count={COUNTS[count]}", f"train.steps={STEPS}"]
    common += ["train.clip_norm=0.5"] if precision == "float64" else []
    complete(tmp_path / "single", make_job(*common, "parallel=single"))
    expected = losses(tmp_path / "single")
    assert expected[-1] < 0.2 * expected[0], "it learns nothing, so equal losses would prove nothing"
    for mode in modes_for(precision, count):
        folder = tmp_path / mode
        complete(folder, make_job(*common, *MODES[mode]))
        assert relative_difference(expected, losses(folder)) < limit, mode
        for name, weight in weights(tmp_path / "single").items():
            assert weight.dtype == getattr(torch, precision)
            difference = (weights(folder)[name] - weight).norm() / weight.norm()
            assert difference < limit, (mode, name)


def test_the_order_of_samples_is_that_of_a_single_process(tmp_path: Path) -> None:
    complete(tmp_path / "single", make_job("parallel=single"))
    expected = order_of_samples(tmp_path / "single")
    assert sorted(expected[0]) == list(range(101)) != expected[0]
    assert expected[0] != expected[1]
    for ranks in (2, 3, 4):
        complete(tmp_path / f"{ranks}", make_job(f"devices_per_node={ranks}"))
        assert order_of_samples(tmp_path / f"{ranks}") == expected


def test_tied_weights_and_several_inputs_survive_replication(tmp_path: Path) -> None:
    common = ["task=digit_tasks:Tied", "train.precision=float64", f"train.steps={STEPS}"]
    complete(tmp_path / "single", make_job(*common, "parallel=single"))
    expected = losses(tmp_path / "single")
    for mode in ("dp 3", "ddp 2"):
        complete(tmp_path / mode, make_job(*common, *MODES[mode]))
        assert relative_difference(expected, losses(tmp_path / mode)) < 1e-12, mode
