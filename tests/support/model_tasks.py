"""Tasks of the gloo tier whose models are as users have them: frozen, sparse, complex, changing in a forward pass."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from digit_tasks import Small
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint


class Odd(nn.Module):
    """Much of what a model may be, in one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.frozen, self.norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.frozen.running_mean.fill_(0.1)  # type: ignore[union-attr]
        self.dropout, self.count = nn.Dropout(0.3), 0
        self.narrow = parametrizations.weight_norm(nn.Linear(144, 16))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.head = weight_norm(nn.Linear(16, 10))
        self.phase = nn.Parameter(torch.ones(16, dtype=torch.complex64))
        self.codes = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("grid", torch.eye(16).to_sparse())
        self.register_buffer("turn", torch.polar(torch.ones(16), torch.linspace(0, 1, 16)))
        self.register_buffer("mask", torch.ones(2, 16, dtype=torch.bool))
        self.register_buffer("places", torch.arange(16).expand(2, -1))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        if not hasattr(self, "made"):
            self.register_buffer("made", torch.zeros(4))
        if self.training:
            self.count += 1
            self.calls += 1
            self.made += self.frozen.training + images.detach().mean()
        hidden = self.norm(self.frozen(checkpoint(self.stem, images, use_reentrant=False)))
        hidden = self.dropout(torch.tanh(hidden)).flatten(1)
        hidden = hidden + self.made.sum() / 100 + self.calls / 100 + self.count / 100
        hidden = torch.sparse.mm(self.grid, self.narrow(hidden).T).T
        hidden = (hidden * self.mask[0] * self.phase * self.turn).real + self.places[0] / 16
        logits: Tensor = self.head(hidden)
        return logits


class Peculiar(Small):
    """An odd model: as it comes, with a batch norm and a dropout that its user froze, or all in evaluation mode."""

    def __init__(self, mode: str = "frozen", dtype: str = "float32", **arguments: Any) -> None:
        """`mode`: frozen, or evaluation; `dtype`: of the weights of an ordinary model, if not float32."""
        super().__init__(**arguments)
        self.mode, self.dtype = mode, getattr(torch, dtype)

    def model(self) -> nn.Module:
        """In that mode."""
        if self.dtype != torch.float32:
            return super().model().to(self.dtype)
        model = Odd()
        if self.mode == "evaluation":
            return model.eval()
        model.frozen.eval()
        return model

    def inputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """As exact as the weights."""
        return batch[0].to(self.dtype)

    def summary(self, sums: Mapping[str, Tensor], count: int) -> Mapping[str, float]:
        """Nothing besides the loss."""
        return {}


class Late(nn.Module):
    """Makes a layer in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 8)
        self.last: nn.Module | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        hidden: Tensor = self.first(images.flatten(1))
        if self.last is None:
            self.last = nn.Linear(hidden.shape[1], 10)
        logits: Tensor = self.last(hidden)
        return logits


class Detached(nn.Module):
    """Cuts the way of the gradients, and unfreezes a weight in the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)
        self.extra, self.passes = nn.Parameter(torch.zeros(10), requires_grad=False), 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        self.passes += self.training
        self.extra.requires_grad_(self.passes > 1)
        logits: Tensor = self.last(self.first(images.flatten(1)).detach())
        return logits


class Centred(nn.Module):
    """Takes its first offset from the data, as flows do; its layers may be computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.ready = nn.Parameter(torch.zeros(64)), False
        self.last = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        pixels = images.flatten(1)
        if not self.ready:
            self.offset.data.copy_(-pixels.mean(0))
            self.ready = True
        logits: Tensor = checkpoint(self.last, pixels + self.offset, use_reentrant=True)
        return logits


class Uneven(Small):
    """A model that is not the same on all ranks."""

    def model(self) -> nn.Module:
        """That one."""
        return Centred()


class Untrained(Small):
    """A model of which a part does not learn."""

    def __init__(self, late: bool) -> None:
        """`late`: since it is made too late."""
        super().__init__()
        self.late = late

    def model(self) -> nn.Module:
        """Either kind."""
        return Late() if self.late else Detached()


class Narrow(Small):
    """A batch norm of vectors, which refuses a single one."""

    def model(self) -> nn.Module:
        """Two layers with the norm between."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


class Wide(Small):
    """Sixteen layers of 4 MiB; a rank prints the most memory of its own that it ever had, above what it began with."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.peak = private_memory(), 0
        threading.Thread(target=self.watch, daemon=True).start()

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        print("highest", self.peak - self.began, flush=True)
        return super().loss(output, batch)

    def watch(self) -> None:
        while True:
            self.peak = max(self.peak, private_memory())
            time.sleep(0.002)

    def model(self) -> nn.Module:
        layers = [layer for _ in range(16) for layer in (nn.Linear(1024, 1024), nn.Tanh())]
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 1024), *layers, nn.Linear(1024, 10))


def private_memory() -> int:
    """Of this process, in MiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) >> 10
