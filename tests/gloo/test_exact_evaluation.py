"""Evaluation: each held-out sample once, and exactly the numbers of a single process, whatever the world size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import complete, evaluations, make_job
from states import read_state
from torch.nn import functional

from trainer.tasks.digits import load_digits

RANKS = {1: ["parallel=single"], 2: ["devices_per_node=2"], 3: ["devices_per_node=3"], 4: ["devices_per_node=4"]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a net that knows some digits and not others: evaluation is then no rounding-friendly number."""
    run = complete(tmp_path_factory.mktemp("weights"), make_job("parallel=single"))
    return run.folder / "checkpoints/step-000000021"


def evaluate(folder: Path, weights: Path, ranks: int, *keys: str) -> dict[str, float]:
    """Evaluate by a training of one step that changes nothing: the learning rate is far below rounding."""
    job = make_job(
        *RANKS[ranks],
        f"checkpoint.load={weights}",
        "train.steps=1",
        "train.lr=1e-30",
        "train.optimizer=sgd",
        "train.weight_decay=0",
        *keys,
    )
    complete(folder, job)
    (values,) = evaluations(folder)
    return values


@pytest.mark.parametrize("held_out, batch_size", [(371, 8), (371, 256), (1, 8), (17, 5), (97, 97)])
def test_any_world_size_gives_the_same_numbers(tmp_path: Path, weights: Path, held_out: int, batch_size: int) -> None:
    """Sizes that no world size divides, fewer batches than ranks, and a single sample: equal, not merely close."""
    keys = [f"task_args.held_out={held_out}", f"evaluation.batch_size={batch_size}"]
    expected = evaluate(tmp_path / "1", weights, 1, *keys)
    for ranks in (2, 3, 4) if held_out == 371 else (2, 4):
        assert evaluate(tmp_path / f"{ranks}", weights, ranks, *keys) == expected, ranks


def test_the_numbers_are_those_of_plain_pytorch(tmp_path: Path, weights: Path) -> None:
    values = evaluate(tmp_path, weights, 3, "task_args.held_out=371", "train.precision=float64")
    images, labels = load_digits()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.Identity(), torch.nn.Tanh(), torch.nn.Identity(), torch.nn.Flatten(),
        torch.nn.Linear(144, 10),
    ).double()  # fmt: skip
    model.load_state_dict(read_state(tmp_path)["model"])
    with torch.no_grad():
        output = model(images[-371:].double())
    assert values["loss"] == pytest.approx(float(functional.cross_entropy(output, labels[-371:])), rel=1e-12)
    assert values["accuracy"] == float((output.argmax(1) == labels[-371:]).double().mean())


def test_ranks_evaluate_the_model_that_is_saved(tmp_path: Path) -> None:
    """Each rank's own batch statistics must not enter: a single process gives the checkpoint the same numbers."""
    complete(tmp_path / "trained", make_job("devices_per_node=2", "task_args.batchnorm=true", "task_args.held_out=371"))
    saved = tmp_path / "trained/checkpoints/step-000000021"
    again = evaluate(
        tmp_path / "again", saved, 1, "task_args.batchnorm=true", "task_args.held_out=371", "task=digit_tasks:Frozen"
    )
    trained = evaluations(tmp_path / "trained")[-1]
    assert {**again, "step": 21} == trained


def test_data_parallel_evaluates_on_all_replicas(tmp_path: Path, weights: Path) -> None:
    """Chunks have other sizes than a single process's batches, so sums agree within rounding only."""
    keys = ["task_args.held_out=371", "train.precision=float64"]
    expected = evaluate(tmp_path / "1", weights, 1, *keys)
    complete(
        tmp_path / "dp",
        make_job(
            "parallel=dp",
            "devices_per_node=3",
            f"checkpoint.load={weights}",
            "train.steps=1",
            "train.lr=1e-30",
            "train.optimizer=sgd",
            "train.weight_decay=0",
            *keys,
        ),
    )
    (values,) = evaluations(tmp_path / "dp")
    assert values == pytest.approx(expected, rel=1e-12)
