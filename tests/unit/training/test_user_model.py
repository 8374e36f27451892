"""What `Task.model` returns: made ready, told about, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.job import Job, Train
from trainer.errors import JobError
from trainer.tasks.digits import Digits
from trainer.training.user_model import take_model, weights_beside

CPU = torch.device("cpu")


def take(model: Any, **train: Any) -> tuple[nn.Module, str]:
    model, notices = take_model(model, Job(train=Train(**train)), CPU)
    return model, " | ".join(notices)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.Linear(3, 3), nn.Dropout()))


class Freezing(nn.Sequential):
    """Freezes its batch norm in its own `train`, as detectors do."""

    def train(self, mode: bool = True) -> Freezing:
        """All but that one."""
        super().train(mode)
        self[1].eval()
        return self


def test_a_model_in_evaluation_mode_trains() -> None:
    model, told = take(net().eval())
    assert all(part.training for part in model.modules())
    assert told.startswith("model() returned the model in evaluation mode")
    assert take(net())[1] == ""


def test_what_the_user_froze_stays_frozen() -> None:
    model = net()
    model[1].eval()
    model[3].eval()
    model, told = take(model)
    assert [name for name, part in model.named_modules() if not part.training] == ["1", "3", "3.0", "3.1"]
    assert told == "these parts stay in evaluation mode, as you set them: 1 (BatchNorm1d), 3 (Sequential)"
    model.eval()
    model[0].train()
    assert take(model)[1].endswith("1 (BatchNorm1d), 2 (Dropout), 3 (Sequential)")
    assert not model.training
    freezing = Freezing(*net())
    assert freezing[1].training
    assert take(freezing)[1].endswith(": 1 (BatchNorm1d)")
    assert not freezing[1].training and freezing[2].training
    assert take(Freezing(*net()).eval())[1].startswith("model() returned the model in evaluation mode")


class Volume(nn.Module):
    """Weights of four and of five dimensions, and a buffer whose numbers share their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.deep = nn.Conv2d(2, 2, 3), nn.Conv3d(2, 2, 3)
        self.register_buffer("places", torch.arange(3).expand(2, -1), persistent=False)


def test_memory_is_laid_out() -> None:
    taken, _ = take(Volume(), channels_last=True)
    model: Any = taken
    assert model.flat.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.deep.weight.is_contiguous()
    model.places.copy_(torch.ones(2, 3))
    assert "places" not in model.state_dict()


class Fixed(nn.Linear):
    """Cannot change its mode, as an exported program."""

    def train(self, mode: bool = True) -> Fixed:
        """Refuse."""
        raise NotImplementedError("Calling train() is not supported yet.")


@torch.inference_mode()
def made_in_inference_mode() -> nn.Module:
    return nn.Linear(2, 2)


class Filtering(nn.Linear):
    """Saves less than it loads."""

    def state_dict(self, *arguments: Any, **more: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The bias alone."""
        return {"bias": self.bias.detach()}


@pytest.mark.parametrize("model, train, problem", [
    ((nn.Linear(2, 2), "tokenizer"), {}, "is not a torch.nn.Module"),
    (nn.Linear, {}, "is not a torch.nn.Module"),
    (nn.DataParallel(nn.Linear(2, 2)), {}, "wraps the model already"),
    (nn.Sequential(nn.LazyLinear(3)), {}, "Call the model once on a batch"),
    (nn.Linear(2, 2, device="meta"), {}, "on the meta device"),
    (Fixed(2, 2), {}, "cannot be moved to cpu and trained: Calling train"),
    (made_in_inference_mode(), {}, "weight': was made in inference mode"),
    (Filtering(2, 2), {}, "cannot be loaded again.*weight"),
    (nn.Linear(2, 2).half(), {"precision": "fp16"}, r"Return model\.float\(\)"),
    (nn.Linear(2, 2).bfloat16(), {"ema_decay": 0.9}, r"Return model\.float\(\)"),
    (nn.Embedding(3, 2, sparse=True), {}, "sparse=False there, or use sgd"),
    (nn.Embedding(3, 2, sparse=True), {"optimizer": "sgd", "clip_norm": 1.0}, "train.clip_norm"),
    (nn.Embedding(3, 2, sparse=True), {"optimizer": "sgd", "weight_decay": 0.1}, "train.weight_decay"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused(model: Any, train: dict[str, Any], problem: str) -> None:
    with pytest.raises(JobError, match=problem):
        take(model, **train)


def test_what_is_unusual_is_taken() -> None:
    assert "updates below their 3 digits are lost" in take(nn.Linear(2, 2).bfloat16())[1]
    assert take(nn.Linear(2, 2).bfloat16().requires_grad_(False))[1] == ""
    phases, _ = take(nn.ParameterList([torch.ones(2, dtype=torch.complex64)]), precision="float64")
    assert phases[0].dtype == torch.complex128  # type: ignore[index]
    model, told = take(nn.Linear(2, 2).half(), precision="float64")
    assert (model.weight.dtype, told) == (torch.float64, "")


def test_weights_of_the_task_that_nobody_trains_are_told() -> None:
    task: Any = Digits()
    task.net = task.model()
    task.centres, task.teacher = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    [notice] = weights_beside(task, nn.Sequential(task.net))
    assert notice.startswith("task.centres has weights that are no part of the model")
