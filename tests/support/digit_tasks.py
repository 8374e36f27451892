"""Tasks for the gloo tier, on real digits: user code as a user would write it, each with one peculiarity."""

from __future__ import annotations

import random
import signal
from collections.abc import Mapping
from typing import Any, NamedTuple

import faults
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from trainer.signals import SIGNALS
from trainer.task import Task
from trainer.tasks.digits import load_digits
from trainer.training.trial import SAMPLES

IMAGES, LABELS = load_digits()


class Small(Task):
    """Classify digits with one convolution."""

    def __init__(self, count: int = 101, held_out: int = 37, dropout: float = 0.0, batchnorm: bool = False) -> None:
        """`count` images to train on, `held_out` others to evaluate."""
        self.count, self.held_out, self.dropout, self.batchnorm = count, held_out, dropout, batchnorm

    def model(self) -> nn.Module:
        """A convolution, normalised and thinned out when asked for, and a linear layer."""
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if self.batchnorm else nn.Identity(), nn.Tanh(),
            nn.Dropout(self.dropout), nn.Flatten(), nn.Linear(4 * 36, 10),
        )  # fmt: skip

    def train_dataset(self) -> TensorDataset:
        """The first images."""
        return TensorDataset(IMAGES[: self.count], LABELS[: self.count])

    def eval_dataset(self) -> TensorDataset:
        """The last images."""
        return TensorDataset(IMAGES[-self.held_out :], LABELS[-self.held_out :])

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of each image."""
        return functional.cross_entropy(output, batch[1], reduction="none")

    def metrics(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Whether each image was recognised."""
        if len(batch[1]) > SAMPLES:  # not the trial before the first step
            faults.batch_evaluated()
        return {"accuracy": output.argmax(1) == batch[1]}


class Named(nn.Module):
    """Gives its input a name."""

    def forward(self, logits: Tensor) -> dict[str, Tensor]:
        """Logits (batch, 10)."""
        return {"logits": logits}


class Labelled(Small):
    """Its model uses one layer twice, and gives a dictionary, as those of Hugging Face do."""

    def model(self) -> nn.Module:
        """Two halves can both have the layer that is used twice."""
        twice = nn.Linear(64, 64)
        return nn.Sequential(nn.Flatten(), twice, nn.Tanh(), twice, nn.Tanh(), nn.Linear(64, 10), Named())

    def loss(self, output: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """Of the logits."""
        return super().loss(output["logits"], batch)

    def metrics(self, output: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Of the logits."""
        return super().metrics(output["logits"], batch)


class Ragged(Small):
    """Its batches have different sizes, as those of texts that are padded to the longest of a batch."""

    def model(self) -> nn.Module:
        """Two stages get about the same size where they are cut before the mean."""
        layer = nn.Conv2d(1, 4, 3, padding=1)
        return nn.Sequential(
            layer.requires_grad_(False), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
        )

    def collate(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        """As wide as the first label says."""
        images, labels = (torch.stack(column) for column in zip(*samples, strict=True))
        return images[..., : 8 - int(labels[0]) % 2], labels


class Deaf(Small):
    """Takes the signals that ask for a stop."""

    def __init__(self) -> None:
        super().__init__()
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)


class Example(NamedTuple):
    """A batch with fields, and with something that is no tensor."""

    pixels: Tensor
    labels: Tensor
    names: list[str]


class Autoencoder(nn.Module):
    """Encoder and decoder share one matrix; the digit is named by another layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 16, bias=False)
        self.decoder = nn.Linear(16, 64, bias=False)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().T.clone())
        self.again = self.encoder
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(10))])
        self.name = nn.Linear(16, 10, bias=False)
        self.register_buffer("centre", torch.full((64,), 0.3))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, 10) and pixels (batch, 64)."""
        code = torch.tanh(self.encoder(pixels - self.centre))
        restored = self.decoder(code)
        return self.name(torch.tanh(self.again(restored))) + self.bias[0], restored


class Tied(Small):
    """Shared layers, parameter lists, buffers; batches that are named tuples; outputs that are tuples."""

    def model(self) -> nn.Module:
        """A small autoencoder."""
        return Autoencoder()

    def collate(self, samples: list[Any]) -> Example:
        """With names."""
        images, labels = zip(*samples, strict=True)
        return Example(torch.stack(images).flatten(1), torch.stack(labels), [f"digit {int(y)}" for y in labels])

    def inputs(self, batch: Example) -> Tensor:
        """The pixels."""
        return batch.pixels

    def loss(self, output: tuple[Tensor, Tensor], batch: Example) -> Tensor:
        """Cross entropy plus squared error."""
        assert batch.names[0].startswith("digit ")
        squared = (output[1] - batch.pixels).square().mean(1)
        return functional.cross_entropy(output[0], batch.labels, reduction="none") + squared

    def metrics(self, output: tuple[Tensor, Tensor], batch: Example) -> Mapping[str, Tensor]:
        """Whether each image was recognised."""
        return {"accuracy": output[0].argmax(1) == batch.labels}


class Frozen(Small):
    """Keeps its batch statistics as they are: evaluates what it was given."""

    def model(self) -> nn.Module:
        """With a momentum of zero, running statistics never change."""
        model = super().model()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        return model


class Scored(Small):
    """Its evaluations give the scores that the job file says."""

    def __init__(self, scores: list[float]) -> None:
        """Of one evaluation after another."""
        super().__init__()
        self.scores, self.turn = scores, 0

    def summary(self, sums: Mapping[str, Tensor], count: int) -> Mapping[str, float]:
        """The next one."""
        self.turn += 1
        return {"score": self.scores[self.turn - 1]}


class Heads(nn.Module):
    """Two heads, of which the second is used in the training steps [`first`, `last`] only."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.trunk, self.head, self.second = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 10)
        self.first, self.last, self.step = first, last, 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        self.step += self.training
        trunk = torch.tanh(self.trunk(images.flatten(1)))
        logits: Tensor = self.head(trunk)
        return logits + self.second(trunk) if self.first <= self.step <= self.last else logits


class Branched(Small):
    """Some parameters are not always used."""

    def __init__(self, first: int = 0, last: int = -1, **arguments: Any) -> None:
        """In which training steps the second head is used; default: never."""
        super().__init__(**arguments)
        self.first, self.last = first, last

    def model(self) -> nn.Module:
        """Two heads on one trunk."""
        return Heads(self.first, self.last)


class Poisoned(Small):
    """One training image makes the loss NaN, or infinite, for some steps."""

    def __init__(self, index: int, first: int, last: int, value: str = "nan", stops: bool = False) -> None:
        """`index` of the image; from which training step of a process to which. `stops`: a signal comes just then."""
        super().__init__()
        self.stops = stops
        self.index, self.first, self.last, self.value, self.step = index, first, last, float(value), 0

    def train_dataset(self) -> TensorDataset:
        """With a mark on the image."""
        images = IMAGES[: self.count].clone()
        images[self.index, 0, 0, 0] = 0.75
        return TensorDataset(images, LABELS[: self.count])

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Not finite for the image."""
        losses = super().loss(output, batch)
        self.step += torch.is_grad_enabled()
        if not self.first <= self.step <= self.last:
            return losses
        marked = batch[0][:, 0, 0, 0] == 0.75
        if self.stops and marked.any():
            signal.raise_signal(signal.SIGTERM)
        return torch.where(marked, self.value, losses)


class Large(Small):
    """Losses in other units."""

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy, and a large constant."""
        return super().loss(output, batch) + 1e6


class Compiled(Small):
    """Tells how many graphs the compiler made of a model whose class is torch's own."""

    def model(self) -> nn.Module:
        """Quick to compile: matrix products need no generated C++."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def summary(self, sums: Mapping[str, Tensor], count: int) -> Mapping[str, float]:
        """Of this process."""
        return {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


class Deterministic(Small):
    """Demands deterministic kernels on CPUs, where a job cannot ask for them."""

    def __init__(self, missing_after: int = 9999, missing_in_evaluation: bool = False, **arguments: Any) -> None:
        """An operation without such a kernel is used after so many batches, or in evaluations."""
        super().__init__(dropout=0.2, batchnorm=True, **arguments)
        self.left, self.in_evaluation = missing_after, missing_in_evaluation
        torch.use_deterministic_algorithms(True)

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of each image."""
        if torch.is_grad_enabled():
            self.left -= 1
        if self.left < 0 or (self.in_evaluation and not torch.is_grad_enabled()):
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return super().loss(output, batch)


class Drawing(Small):
    """Draws from every global generator, in the losses, the metrics and the summary."""

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of each image, more or less."""
        noise = random.gauss(1, 0.1) + np.random.normal(0, 0.1) + float(torch.randn(())) / 10
        return super().loss(output, batch) * noise

    def metrics(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """A number for each image, besides."""
        numbers = torch.rand(len(output)) + random.random() + np.random.rand()
        return {**super().metrics(output, batch), "numbers": numbers}

    def summary(self, sums: Mapping[str, Tensor], count: int) -> Mapping[str, float]:
        """One more."""
        return {**super().summary(sums, count), "number": random.random() + np.random.rand() + float(torch.rand(()))}
