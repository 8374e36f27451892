"""Tasks that return other things than a loss per sample, and draw from generators of their own."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from data_tasks import Sample
from digit_tasks import IMAGES, LABELS, Small
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, random_split


class Tokens(Small):
    """As many tokens of a sample count as its label says, of nine; the mean is over all tokens of the global batch."""

    def __init__(self, form: str = "samples") -> None:
        """`form`: of the pair, "samples" or "batch"."""
        super().__init__()
        self.form = form

    def loss(self, output: Tensor, batch: Sample) -> Any:
        """The sum over tokens and their number: of each sample, or of the batch."""
        counts = torch.arange(9) < batch[1][:, None]
        losses = functional.cross_entropy(output, batch[1], reduction="none")[:, None] * (1 + torch.arange(9))
        sums = torch.where(counts, losses, 0).sum(1)
        return (sums, counts.sum(1)) if self.form == "samples" else (sums.sum(), int(counts.sum()))


class Jitter(Dataset[Sample]):
    """Digits moved and blurred by four kinds of generators: attributes, of a class, of a module, and made late."""

    made_for_all = random.Random(1)

    def __init__(self, count: int) -> None:
        """Generators without a seed, as transforms have them."""
        self.count, self.transform = count, Transform()
        self.late: Any = None

    def __len__(self) -> int:
        """As many as asked for."""
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """An image that is another in each epoch."""
        if self.late is None:
            self.late = np.random.default_rng()
        noise = self.late.normal() + self.made_for_all.random() + GENERATOR.random()
        return self.transform(IMAGES[index]) + 0.01 * float(noise), LABELS[index]


class Transform:
    """Moves an image at random."""

    def __init__(self) -> None:
        self.R, self.generator = np.random.RandomState(), torch.Generator()

    def __call__(self, image: Tensor) -> Tensor:
        """By up to two rows, and as many columns."""
        rows, columns = int(self.R.randint(3)), int(torch.randint(3, (), generator=self.generator))
        return torch.roll(image, (rows, columns), (1, 2))


GENERATOR = np.random.default_rng()


class Jittered(Small):
    """Augmented by generators of its own, and split at random; the loss may draw as well."""

    def __init__(self, noise: float = 0.0) -> None:
        """`noise`: of the loss, by a generator of the task's."""
        super().__init__()
        self.noise, self.generator = noise, torch.Generator()

    def train_dataset(self) -> Any:
        """Most of them."""
        dataset = random_split(Jitter(100), [70, 30])[0]
        self.used = set(dataset.indices)
        return dataset

    def eval_dataset(self) -> Any:
        """The others, which only equal draws keep apart from the first."""
        dataset = random_split(Jitter(100), [70, 30])[1]
        assert not self.used & set(dataset.indices)
        return dataset

    def loss(self, output: Tensor, batch: Sample) -> Tensor:
        """More or less."""
        return super().loss(output, batch) * (1 + self.noise * float(torch.rand((), generator=self.generator)))


class Penalty(Small):
    """A penalty for the slope of the output, in evaluations too. Double precision by torch's own default."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_default_dtype(torch.float64)

    def model(self) -> nn.Module:
        """Smooth."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh())

    def inputs(self, batch: Sample) -> Tensor:
        """Kept, for the derivative."""
        self.given = batch[0].double().requires_grad_()
        return self.given

    def loss(self, output: Tensor, batch: Sample) -> Tensor:
        """Cross entropy and squared slope."""
        (slope,) = torch.autograd.grad(output.sum(), self.given, create_graph=True)
        return super().loss(output, batch) + slope.flatten(1).square().sum(1)


class Counting(Small):
    """Remembers what it computed, in many places."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log = 0, [0]

    def metrics(self, output: Tensor, batch: Sample) -> Mapping[str, Any]:
        """As lists and arrays."""
        self.calls += 1
        self.log.append(self.calls)
        hits = output.argmax(1) == batch[1]
        return {"hits": hits.tolist(), "again": hits.numpy()}

    def summary(self, sums: Mapping[str, Tensor], count: int) -> Mapping[str, Any]:
        """As scalars of three kinds, and how often it was called."""
        share = sums["hits"] / count
        kinds = {"tensor": share, "array": np.float64(share.item()), "flag": np.bool_(True), 7: np.float32(0.5)}
        return {**kinds, "calls": len(self.log) - 1}  # type: ignore[dict-item]


class Named(Small):
    """Says in which order a set has its texts; names a metric by what is in the batch."""

    def __init__(self, count: int = 101, late: bool = False) -> None:
        super().__init__(count)
        self.late = late
        print("order of names", list({f"class-{number}" for number in range(12)}), flush=True)

    def metrics(self, output: Tensor, batch: Sample) -> Mapping[str, Tensor]:
        """One for all, and perhaps one that a batch of few lacks."""
        values = dict(super().metrics(output, batch))
        return {**values, "more": values["accuracy"]} if self.late and len(output) > 5 else values


class Keyword(nn.Module):
    """Wants its inputs by name, and returns an object, as Hugging Face's models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor, labels: Tensor) -> SimpleNamespace:
        """Logits among others."""
        return SimpleNamespace(logits=self.inner(pixels), labels=labels)


class Whole(Small):
    """Its loss is made for whole batches, as a contrastive one: of 10 samples, or of all 37 for evaluation."""

    def loss(self, output: Tensor, batch: Sample) -> Any:
        """The usual one. ValueError: another size."""
        if len(output) not in (10, 37):
            raise ValueError(f"{len(output)} samples")
        return super().loss(output, batch)


class Uncalled(Small):
    """Nobody says that its batches are keyword arguments."""

    def model(self) -> nn.Module:
        """The usual one inside."""
        return Keyword(super().model())

    def collate(self, samples: list[Sample]) -> Any:
        """As a tokenizer does it."""
        pixels, labels = zip(*samples, strict=True)
        return UserDict(pixels=torch.stack(pixels), labels=torch.stack(labels))

    def loss(self, output: Any, batch: Any) -> Tensor:
        """The usual one."""
        return super().loss(output.logits, (output.logits, batch["labels"]))

    def metrics(self, output: Any, batch: Any) -> Mapping[str, Tensor]:
        """The usual ones."""
        return super().metrics(output.logits, (output.logits, batch["labels"]))


class Called(Uncalled):
    """The task says it."""

    def output(self, model: nn.Module, batch: Any) -> Any:
        """By name."""
        return model(**batch)
