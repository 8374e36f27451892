"""Checkpoints of which each rank writes a part: `shard-<index>-of-<count>.safetensors`, and in `state.pt` all else.

Ranks and nodes meet in the folder that is to become the checkpoint. Whoever writes a shard leaves a note beside it, and
who writes the first one commits when all notes are there; that needs none of the ranks any more. Why this is not
torch.distributed.checkpoint: docs/design.md.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from trainer.checkpoint import safetensors
from trainer.checkpoint.safetensors import Tensors
from trainer.data.nested import INSIDE, walk
from trainer.parallel.patience import Patience
from trainer.parallel.shards import Part, span
from trainer.records import write_json, write_text

STATE = "state.pt"
FAILED = "failed"
"""A note of one who could not write its shard."""
STILL_S = 5.0
"""How long nothing may grow when the rank that ordered has gone, before the others' shards are given up."""


@dataclass(frozen=True)
class Sharded:
    """Stands in `state.pt` for a tensor whose rows are in the shards."""

    name: str
    shape: tuple[int, ...]
    count: int
    """Of shards."""


def shard_name(index: int, count: int) -> str:
    """The file of a shard."""
    return f"shard-{index:05d}-of-{count:05d}.safetensors"


def take_out(contents: Any, count: int) -> tuple[Any, dict[str, Part]]:
    """The contents with a `Sharded` for each part, and the parts by names that say where they were."""
    parts: dict[str, Part] = {}

    def replace(value: Any, name: str) -> Any:
        if isinstance(value, Part):
            parts[name] = value
            return Sharded(name, value.shape, count)
        if isinstance(value, dict):
            return {key: replace(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(replace(inner, f"{name}.{number}") for number, inner in enumerate(value))
        return value

    return replace(contents, ""), parts


def write_shard(parts: dict[str, Part], file: Any) -> None:
    """Write a rank's rows; the file itself says of which tensors they are, and which."""
    kinds = {name: ((part.rows.dtype, tuple(part.rows.shape)), [part.rows]) for name, part in parts.items()}
    whole = {name: [part.start, *part.shape] for name, part in parts.items()}
    safetensors.write(kinds, {"first_row_and_whole_shape": json.dumps(whole)}, file)


class Meeting:
    """A folder in which the writers of one checkpoint meet."""

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self.folder, self.index, self.count = folder, index, count
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, files: dict[str, Any]) -> None:
        """Tell the first writer which files are done, with what the manifest is to say of them."""
        write_json(self.folder / f"{self.index}.done", files, sync=False)

    def fail(self, error: BaseException) -> None:
        """Tell it that they will not come. What is here is in the way of that, if the disk is full."""
        with suppress(OSError):
            (self.folder / shard_name(self.index, self.count)).unlink(missing_ok=True)
            text = f"the writer of shard {self.index}: {error}"
            write_text(self.folder / FAILED, json.dumps([getattr(error, "errno", None) or errno.EIO, text]), sync=False)

    def collect(self, is_alone: Callable[[], bool], limit_s: float) -> dict[str, Any]:
        """Wait for the notes of all, and remove them. `is_alone`: the rank that ordered has gone.

        `limit_s`: how long nothing may grow before that. Raises OSError: they will not come.
        """
        notes = [self.folder / f"{index}.done" for index in range(self.count)]
        grown = -1
        while missing := [index for index, note in enumerate(notes) if not note.exists()]:
            if (self.folder / FAILED).exists():
                raise OSError(*json.loads((self.folder / FAILED).read_text()))
            size = self._size()
            if size != grown:
                grown, since, patience = size, time.monotonic(), Patience(limit_s, lambda: None)
            if not is_alone():
                since = time.monotonic()
            if time.monotonic() - since > STILL_S:
                raise OSError(f"shards {missing} did not come: the ranks that had them were killed before they saved")
            if not patience.look():
                raise OSError(f"shards {missing} did not come: nothing was written for {limit_s:.0f} s")
            time.sleep(0.01)
        found: dict[str, Any] = {}
        for note in notes:
            found |= json.loads(note.read_text())
            note.unlink()
        return found

    def _size(self) -> int:
        """Of what is here so far; drafts come and go."""
        size = 0
        for name in os.listdir(self.folder):
            with suppress(FileNotFoundError):
                size += (self.folder / name).stat().st_size
        return size


def read_state(folder: Path) -> Any:
    """What `state.pt` says, with a `Sharded` for each tensor that is in the shards."""
    with safe_globals([Sharded]):
        return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)


class Shards:
    """The shards of a checkpoint, opened when they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: dict[str, Tensors] = {}

    def pieces(self, tensor: Sharded, begin: int = 0, end: int | None = None) -> Iterator[Tensor]:
        """The rows from `begin` to `end` of a tensor, in the pieces in which the shards have them."""
        rows = tensor.shape[0]
        end = rows if end is None else end
        for index in range(tensor.count):
            first, last = span(rows, index, tensor.count)
            if max(first, begin) < min(last, end):
                yield self._open(index, tensor.count)[tensor.name][max(begin - first, 0) : end - first]

    def _open(self, index: int, count: int) -> Tensors:
        name = shard_name(index, count)
        if name not in self.opened:
            self.opened[name] = Tensors(self.folder / name)
        return self.opened[name]

    def kind(self, tensor: Sharded) -> safetensors.Kind:
        """Its type and shape."""
        return self._open(0, tensor.count)[tensor.name].dtype, tensor.shape

    def read(self, tensor: Sharded, index: int = 0, count: int = 1) -> Part:
        """Part `index` of `count` of a tensor, in memory of its own."""
        begin, end = span(tensor.shape[0], index, count)
        rows = torch.empty((end - begin, *tensor.shape[1:]), dtype=self.kind(tensor)[0], device="cpu")
        place = 0
        for piece in self.pieces(tensor, begin, end):
            rows[place : place + len(piece)] = piece
            place += len(piece)
        return Part(rows, tensor.shape, begin)

    def fill(self, value: Any, index: int, count: int) -> Any:
        """The state with a rank's parts of the tensors; with the whole tensors, where a rank has all of them."""

        def replace(part: Any) -> Any:
            if not isinstance(part, Sharded):
                return INSIDE
            found = self.read(part, index, count)
            return found.rows if count == 1 else found

        return walk(value, replace)
