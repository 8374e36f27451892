"""Language modelling: a small GPT predicts the bytes of Python's own standard library sources.

The corpus is on every machine. It differs between Python versions: all nodes of a run need the same one, and only
figures of the same one compare.
"""

import math
import os
import sysconfig
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from trainer.errors import JobError
from trainer.task import Task

VOCABULARY = 256  # every byte is a token
END_OF_FILE = b"\0"  # before each file and after the last; Python refuses a source that holds one
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
"""Third-party code, and tests, which Linux distributions package apart from the library."""
HELD_OUT_ONE_IN = 32


@dataclass(frozen=True)
class Shape:
    """Of a model: `layers`, attention `heads`, `width` of the residual stream, `context` in bytes."""

    layers: int
    heads: int
    width: int
    context: int

    @property
    def parameters(self) -> int:
        """Weights and biases; the embedding of the bytes is the output layer too and counts once."""
        layer = 12 * self.width**2 + 13 * self.width  # 4 + 8 matrices; 9 rows of biases, 2 norms of 2 rows
        return self.layers * layer + (VOCABULARY + self.context + 2) * self.width


SIZES = {
    "1m": Shape(layers=3, heads=5, width=160, context=128),
    "10m": Shape(layers=6, heads=6, width=384, context=512),
    "25m": Shape(layers=8, heads=8, width=512, context=1024),
    "gpt2": Shape(layers=12, heads=12, width=768, context=1024),
    "124m": Shape(layers=11, heads=15, width=960, context=1024),
    "1.5b": Shape(layers=48, heads=25, width=1600, context=1024),
}
"""`gpt2` is GPT-2 small (124 million) but for its vocabulary of 256 instead of 50,257: 86 million; `124m` has as many
weights as that, and `1.5b` is its largest.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, table 2 and section 2.3.
"""


def find_sources(folder: Path) -> list[Path]:
    """All `*.py` files under `folder`, relative to it, in the order of their names on every system."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = set(folders) - SKIPPED_FOLDERS
        sources = (name for name in files if name.endswith(".py"))
        # _sysconfigdata_*: generated when Python is built, different on every machine.
        found += (Path(place, name).relative_to(folder) for name in sources if not name.startswith("_sysconfigdata"))
    return sorted(found, key=Path.as_posix)


def is_held_out(path: Path) -> bool:
    """One file in 32, by its name relative to the folder alone: another file more or less moves no other."""
    return zlib.crc32(path.as_posix().encode()) % HELD_OUT_ONE_IN == 0


class Windows(Dataset[Tensor]):
    """Stretches of `context + 1` bytes, uint8; the last byte of one is the first of the next.

    So each byte but the first is predicted once. Fewer than `context` bytes at the end are left out: all windows
    have the same length, which makes the mean over windows the mean over bytes. All are views of the corpus.
    """

    deterministic = True

    def __init__(self, corpus: Tensor, context: int) -> None:
        self.windows = corpus.unfold(0, context + 1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]


class Layer(nn.Module):
    """Causal attention, then a feed-forward net; each behind a norm and added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """(batch, bytes, width) -> the same."""
        batch, length, width = stream.shape
        joint = self.query_key_value(self.norm1(stream)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.attended(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = functional.gelu(self.expand(self.norm2(stream)), approximate="tanh")
        return cast(Tensor, stream + self.contract(hidden))


class Entry(nn.Module):
    """What comes before the layers. The weights are those of a `GPT`."""

    def __init__(self, embedding: nn.Embedding, position: nn.Parameter) -> None:
        super().__init__()
        self.embedding, self.position = embedding, position

    def forward(self, text: Tensor) -> Tensor:
        """Int64 (batch, bytes), at most the context -> (batch, bytes, width)."""
        return cast(Tensor, self.embedding(text) + self.position[: text.shape[1]])


class Exit(nn.Module):
    """What comes after the layers. The weights are those of a `GPT`."""

    def __init__(self, norm: nn.LayerNorm, embedding: nn.Embedding) -> None:
        super().__init__()
        self.norm, self.embedding = norm, embedding

    def forward(self, stream: Tensor) -> Tensor:
        """(batch, bytes, width) -> logits of each next byte (batch, bytes, 256)."""
        return functional.linear(self.norm(stream), self.embedding.weight)


class GPT(nn.Module):
    """GPT-2's architecture and initial weights, over bytes: learned positions, output tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.position = nn.Parameter(torch.empty(shape.context, shape.width))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for name, weight in self.named_parameters():
            if name.endswith(("attended.weight", "contract.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers))
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, text: Tensor) -> Tensor:
        """Int64 (batch, bytes), at most the context -> logits of each next byte (batch, bytes, 256)."""
        stream = self.embedding(text) + self.position[: text.shape[1]]
        for layer in self.layers:
            stream = layer(stream)
        return functional.linear(self.norm(stream), self.embedding.weight)

    def stages(self) -> list[nn.Module]:
        """The same, in modules that follow each other."""
        return [Entry(self.embedding, self.position), *self.layers, Exit(self.norm, self.embedding)]


class ByteLM(Task):
    """Predict the next byte; reports bits per byte on held-out files. `size`: of `SIZES`; `folder`: of the sources."""

    def __init__(self, size: str = "1m", folder: str | None = None) -> None:
        if size not in SIZES:
            raise JobError("task_args.size", size, "no such model", f"Use one of {', '.join(SIZES)}")
        self.shape = SIZES[size]
        self.folder = Path(folder or sysconfig.get_path("stdlib"))
        if not self.folder.is_dir():
            raise JobError("task_args.folder", str(self.folder), "no such folder", "Name one that all nodes see")

    @cached_property
    def corpora(self) -> dict[bool, Tensor]:
        """The bytes of the held-out files (True) and of the others (False), uint8 of shape (bytes,)."""
        texts: dict[bool, bytearray] = {True: bytearray(END_OF_FILE), False: bytearray(END_OF_FILE)}
        for path in find_sources(self.folder):
            texts[is_held_out(path)] += (self.folder / path).read_bytes() + END_OF_FILE
        if min(map(len, texts.values())) <= self.shape.context:
            problem = "has too few Python sources to train on and hold out"
            remedy = "Give a folder of more *.py files, or install Python with its library as files"
            raise JobError("task_args.folder", str(self.folder), problem, remedy)
        return {held_out: torch.frombuffer(text, dtype=torch.uint8) for held_out, text in texts.items()}

    def prepare(self) -> None:
        """The corpus comes with Python: there is nothing to prepare."""

    def model(self) -> GPT:
        return GPT(self.shape)

    def stages(self, model: nn.Module) -> list[nn.Module]:
        return cast(GPT, model).stages()

    def train_dataset(self) -> Windows:
        return Windows(self.corpora[False], self.shape.context)

    def eval_dataset(self) -> Windows:
        return Windows(self.corpora[True], self.shape.context)

    def inputs(self, batch: Tensor) -> Tensor:
        return batch[:, :-1].long()

    def loss(self, output: Tensor, batch: Tensor) -> Tensor:
        """Cross entropy in nats, mean over the bytes of each window: shape (batch,)."""
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        target = batch[:, 1:].long()
        # Flat: with the classes in the middle, as (batch, 256, bytes), it takes three times as long on a CPU.
        nats = functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
        return nats.view(target.shape).mean(1)

    def metrics(self, output: Tensor, batch: Tensor) -> Mapping[str, Tensor]:
        """Of each window: information of its bytes under the model, in bits, and their number."""
        size = batch.shape[1] - 1
        bits = self.loss(output, batch).double() * (size / math.log(2))
        return {"bits": bits, "bytes": torch.full_like(bits, size)}

    def summary(self, sums: Mapping[str, Tensor], count: int) -> Mapping[str, float]:
        """Bits over bytes of all windows; 8 is a model that knows nothing."""
        return {"bits_per_byte": float(sums["bits"] / sums["bytes"])}
