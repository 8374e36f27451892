"""Classify handwritten digits, in a loop of one's own."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils import data

import muster

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--folder", help="folder to keep everything in, and to go on from")
options = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
held_out = torch.arange(len(labels)) % 5 == 4
train_data = data.TensorDataset(images[~held_out], labels[~held_out])
test_data = data.TensorDataset(images[held_out], labels[held_out])


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


def train() -> None:
    model = session.wrap(build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    session.track(model=model, optimizer=optimizer, schedule=schedule)
    for _ in session.epochs(options.epochs):
        for batch in session.batches(train_data, options.batch_size):
            loss = functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)
        schedule.step()
        session.evaluate(test_data, lambda batch: {"accuracy": model(batch[0]).argmax(1) == batch[1]})


with muster.Session(run=options.folder) as session:
    train()
