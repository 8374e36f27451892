"""Tell malignant from benign tumours by 30 measurements of cell nuclei: 569 real cases (Wisconsin, 1995)."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from muster import Task


class Tumours(Task):
    def __init__(self, width=32):  # task_args of the job file
        self.width = width
        measured, benign = map(torch.from_numpy, load_breast_cancer(return_X_y=True))
        measured = (measured - measured.mean(0)) / measured.std(0)
        self.cases = list(zip(measured.float(), benign.float(), strict=True))

    def model(self):
        return nn.Sequential(nn.Linear(30, self.width), nn.ReLU(), nn.Linear(self.width, 1))

    def train_dataset(self):  # anything with len() and [index]
        return self.cases[100:]

    def eval_dataset(self):
        return self.cases[:100]

    def collate(self, samples):  # default: torch's default_collate
        return [torch.stack(column) for column in zip(*samples, strict=True)]

    def loss(self, output, batch):  # one value per sample
        return nn.functional.binary_cross_entropy_with_logits(output[:, 0], batch[1], reduction="none")

    def metrics(self, output, batch):  # means over the held-out cases
        return {"accuracy": (output[:, 0] > 0) == batch[1].bool()}


def parabola(step, steps):  # train.schedule: the share of train.lr
    return 1 - (step / steps) ** 2
