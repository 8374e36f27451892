"""Segmentation: a small U-Net names the digit at each pixel of canvases composed of real handwritten digits.

The digits are those of `trainer.tasks.digits`. Four fifths make the training canvases, fresh ones in every epoch;
one fifth makes the evaluation canvases, always the same ones. No image is in both.
"""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from trainer.errors import JobError
from trainer.task import Task
from trainer.tasks.digits import load_digits

CLASSES = 11  # 0 is the background, 1 + d the digit d
SIDES = range(8, 13)  # side of a pasted digit, pixels; the originals have 8
INK = 0.35  # intensity, of 1, above which a pixel of a digit counts as written and covers what lies under it
TRIES = 6  # random places to try for a digit, until one covers no other digit; the last is taken all the same
NOISE = 0.05  # standard deviation of the noise on a canvas, in the unit of the intensity
GROUPS = 4  # of every group normalisation; `width` is a multiple of it

Sample = tuple[Tensor, Tensor]


class Canvases(Dataset[Sample]):
    """One canvas per digit image: `[i]` shows image i whole, over up to `digits - 1` others; always the same.

    `images`: (n, 1, 8, 8) in [0, 1]; `labels`: (n,); `size`: side of a canvas, pixels.
    """

    deterministic = True

    def __init__(self, images: Tensor, labels: Tensor, size: int, digits: int) -> None:
        self.images, self.labels = images[:, 0].numpy(), labels.numpy()
        self.size, self.digits = size, digits
        self.stretch = {side: _interpolation(8, side) for side in SIDES}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.compose(index, np.random.default_rng(index))

    def compose(self, index: int, rng: np.random.Generator) -> Sample:
        """Paste digits, `index` on top: canvas, float32 (1, size, size), and class of each pixel, int64."""
        canvas = np.zeros((self.size, self.size), dtype=np.float32)
        classes = np.zeros((self.size, self.size), dtype=np.int64)
        others = rng.integers(len(self.labels), size=rng.integers(self.digits))
        for image in (*others, index):
            side = int(rng.choice(SIDES))
            patch = self.stretch[side] @ self.images[image] @ self.stretch[side].T
            ink = patch > INK
            for _ in range(TRIES):
                top, left = rng.integers(self.size - side + 1, size=2)
                place = np.s_[top : top + side, left : left + side]
                if not classes[place][ink].any():
                    break
            canvas[place][ink] = patch[ink] * np.float32(rng.uniform(0.8, 1))
            classes[place][ink] = 1 + self.labels[image]
        canvas += np.float32(NOISE) * rng.standard_normal(canvas.shape, dtype=np.float32)
        return torch.from_numpy(canvas)[None], torch.from_numpy(classes)


class FreshCanvases(Canvases):
    """Canvases that differ in every epoch."""

    sample = Canvases.compose  # with the trainer's generator, which depends on (seed, epoch, index)


def _interpolation(source: int, target: int) -> NDArray[np.float32]:
    """The matrix, (target, source), that stretches a line of pixels linearly; twice applied: bilinear."""
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    return np.stack([np.interp(centres, np.arange(source), unit) for unit in np.eye(source)], 1).astype(np.float32)


class Convolution(nn.Conv2d):
    """3x3, with each filter's weights standardised (mean 0, variance 1 / fan-in) before use.

    Without it GroupNorm learned far more slowly here: mean IoU 0.1 to 0.2 where this reaches 0.6.
    Source: Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019.
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels, 3, stride, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, channels_in, height, width) -> (batch, channels, height / stride, width / stride)."""
        fan_in = self.weight.shape[1:]
        weight = functional.layer_norm(self.weight, fan_in) / math.sqrt(fan_in.numel())
        return functional.conv2d(image, weight, None, self.stride, self.padding)


class Block(nn.Sequential):
    """Two convolutions; the first may halve the resolution. GroupNorm: no result depends on how a batch is split."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__(
            Convolution(channels_in, channels, stride), nn.GroupNorm(GROUPS, channels), nn.GELU(),
            Convolution(channels, channels), nn.GroupNorm(GROUPS, channels), nn.GELU(),
        )  # fmt: skip


class UNet(nn.Module):
    """Three resolutions, halved by strided convolutions and doubled by transposed ones.

    `width`: channels at full resolution; each lower one has twice as many. Max-pooling and bilinear upsampling have
    no deterministic CUDA backward, which the trainer asks for.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down1 = Block(1, width)
        self.down2 = Block(width, 2 * width, stride=2)
        self.down3 = Block(2 * width, 4 * width, stride=2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = Block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = Block(2 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, canvas: Tensor) -> Tensor:
        """(batch, 1, size, size) -> logits (batch, CLASSES, size, size)."""
        full = self.down1(canvas)
        half = self.down2(full)
        quarter = self.down3(half)
        half = self.merge2(torch.cat((half, self.up2(quarter)), 1))
        full = self.merge1(torch.cat((full, self.up1(half)), 1))
        return cast(Tensor, self.head(full))


class Down(nn.Module):
    """Adds one more resolution to those that there are, the newest last."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The resolutions so far -> the same and a new one."""
        values = values if isinstance(values, tuple) else (values,)
        return (*values, self.block(values[-1]))


class Up(nn.Module):
    """Merges the lowest two resolutions; of the last one it makes the logits."""

    def __init__(self, up: nn.Module, merge: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.merge, self.head = up, merge, head

    def forward(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
        """All resolutions -> the same with one for the last two, or logits."""
        *others, higher, lower = values
        merged = self.merge(torch.cat((higher, self.up(lower)), 1))
        return (*others, merged) if self.head is None else cast(Tensor, self.head(merged))


class Segment(Task):
    """Name the digit at each pixel; reports mean intersection over union and pixel accuracy.

    `width`: channels of the U-Net; `size`: side of a canvas, pixels; `digits`: at most so many on one.
    """

    def __init__(self, width: int = 16, size: int = 32, digits: int = 6) -> None:
        _check("width", width, GROUPS, GROUPS, "channels are normalised in groups")
        _check("size", size, SIDES[-1], 4, "it is halved twice and holds the largest digit")
        _check("digits", digits, 1, 1, "each canvas shows one at least")
        self.width, self.size, self.digits = width, size, digits
        self.images, self.labels = load_digits()
        self.held_out = torch.arange(len(self.labels)) % 5 == 4

    def prepare(self) -> None:
        """The digits come with scikit-learn: there is nothing to prepare."""

    def model(self) -> UNet:
        """About 117,000 weights at the default width."""
        return UNet(self.width)

    def stages(self, model: nn.Module) -> list[nn.Module]:
        """Higher resolutions go along with the lower ones until they are merged."""
        net = cast(UNet, model)
        return [
            net.down1, Down(net.down2), Down(net.down3), Up(net.up2, net.merge2), Up(net.up1, net.merge1, net.head),
        ]  # fmt: skip

    def train_dataset(self) -> FreshCanvases:
        return FreshCanvases(self.images[~self.held_out], self.labels[~self.held_out], self.size, self.digits)

    def eval_dataset(self) -> Canvases:
        return Canvases(self.images[self.held_out], self.labels[self.held_out], self.size, self.digits)

    def loss(self, output: Tensor, batch: Sample) -> Tensor:
        """Cross entropy in nats, mean over the pixels of each canvas: shape (batch,)."""
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return functional.cross_entropy(output, batch[1], reduction="none").mean((1, 2))

    def metrics(self, output: Tensor, batch: Sample) -> Mapping[str, Tensor]:
        """Pixels that prediction and truth share, and that either has, by class: int64 of shape (batch, CLASSES)."""
        classes = torch.arange(CLASSES, device=output.device).view(1, -1, 1, 1)
        predicted = output.argmax(1, keepdim=True) == classes
        true = batch[1][:, None] == classes
        return {"intersection": (predicted & true).sum((2, 3)), "union": (predicted | true).sum((2, 3))}

    def summary(self, sums: Mapping[str, Tensor], count: int) -> Mapping[str, float]:
        """Over all pixels of all canvases: IoU, mean over the classes that occur; share of pixels named right."""
        intersection, union = sums["intersection"].double(), sums["union"].double()
        iou = intersection[union > 0] / union[union > 0]
        return {"mean_iou": float(iou.mean()), "pixel_accuracy": float(intersection.sum()) / (count * self.size**2)}


def _check(name: str, value: object, minimum: int, multiple: int, reason: str) -> None:
    if type(value) is not int or value < minimum or value % multiple:
        kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
        problem = f"is not {kind}, {minimum} or more ({reason})"
        raise JobError(f"task_args.{name}", value, problem, f"For example {name}={max(minimum, 4 * multiple)}")
