"""A fine-tuning with Hugging Face's Trainer, on a session: a tiny model with random weights, numbers for words.

It downloads nothing. What a session adds to such a script: docs/your-script.md.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import muster

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--per-device-batch-size", type=int, default=2)
options = parser.parse_args()


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count by one, two, three, four or five."""

    def __len__(self) -> int:
        return 44

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = (torch.arange(8) * (index % 5 + 1) + index) % 32
        return {"input_ids": words, "labels": words.clone()}


shape: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 32, "n_positions": 8}
with muster.Session(seed=3) as session:
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    arguments = TrainingArguments(
        output_dir=str(session.run / "huggingface"), use_cpu=session.device.type == "cpu", learning_rate=1e-2,
        num_train_epochs=options.epochs, per_device_train_batch_size=options.per_device_batch_size,
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=4, metric_for_best_model="eval_loss",
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Counting(), eval_dataset=Counting(), callbacks=[EarlyStoppingCallback(4)]
    )
    muster.huggingface.attach(trainer, session)
    trainer.train()
