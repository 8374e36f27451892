"""Trainers of Hugging Face and Lightning that a session could not repeat, attached to one, each with its refusal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from transformers import Trainer, TrainingArguments

import muster

DATA = TensorDataset(torch.ones(8, 1))


class Net(lightning.LightningModule):
    """The least that Lightning trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def hugging_face(session: muster.Session, **options: Any) -> None:
    """A trainer with some arguments."""
    arguments = TrainingArguments(output_dir="out", use_cpu=True, report_to=[], **options)
    muster.huggingface.attach(Trainer(nn.Linear(1, 1), arguments, train_dataset=DATA), session)


def with_lightning(session: muster.Session, loader: Any = None, **options: Any) -> None:
    """A trainer with some options, or with a loader."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)
    session.state.tracked.objects.clear()  # of the trainer before
    muster.lightning.attach(trainer, session)
    trainer.fit(Net(), loader)


def tell(attach: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Print how something is refused."""
    try:
        attach(session, *arguments, **options)
    except ValueError as error:
        print("refused", error, flush=True)


with muster.Session() as session:
    tell(hugging_face, dataloader_drop_last=True)
    tell(hugging_face, auto_find_batch_size=True)
    tell(hugging_face, train_sampling_strategy="group_by_length")
    tell(with_lightning, limit_train_batches=0.5)
    tell(with_lightning, overfit_batches=2)
    tell(with_lightning, DataLoader(DATA, batch_size=2, drop_last=True))
    tell(with_lightning, DataLoader(DATA, batch_size=2, sampler=WeightedRandomSampler([1.0] * 8, 8)))
    tell(with_lightning, [torch.ones(2, 1)])
    tell(with_lightning, {"one": DataLoader(DATA, batch_size=2), "two": DataLoader(DATA, batch_size=2)})
sys.modules.pop("trainer.adapters.lightning")
sys.modules["lightning.pytorch"] = None  # type: ignore[assignment]  # as if it were not installed
try:
    print(muster.lightning)
except ImportError as error:
    print(error)
