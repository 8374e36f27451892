"""A state on its way from one rank to all, and whether what several of them read is the same.

A disk is read by one rank: what thousands read at once is thousands of times as much, and a page that was read wrong
by one of them would make it another training than the others' without a word.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint.files import DamagedCheckpoint
from trainer.checkpoint.snapshot import Layout, Row, put_together, read_head, take_apart
from trainer.errors import JobError
from trainer.parallel.base import Parallel

BLOCK = 1 << 17
"""Words of 8 bytes whose sum is taken at a time."""


def give_all(parallel: Parallel, contents: Any, source: int, beat: Callable[[], None]) -> Any:
    """The contents that rank `source` has, on all ranks, which make room for them once. `beat`: signs of life.

    What hangs where is read with `weights_only`, as it would be from a file; the tensors are bytes.
    """
    if parallel.world_size == 1:
        return contents
    mine, head = parallel.rank == source, b""
    tensors: list[Tensor] = []
    if mine:
        tree, tensors = take_apart(contents)
        layout = Layout(tensors)
        head, tensors = layout.head(tree), lay_out(tensors, layout.rows)
    size = parallel.share(len(head), source)
    data = bytearray(head if mine else size)
    parallel.hand_out([torch.frombuffer(data, dtype=torch.uint8)], source, beat)
    if mine:
        parallel.hand_out(list(map(flatten, tensors)), source, beat)
        return contents
    tree, rows = read_head(bytes(data))
    tensors = [make_room(row) for row in rows]
    parallel.hand_out(list(map(flatten, tensors)), source, beat)
    return put_together(tree, tensors)


def read_once(parallel: Parallel, read: Callable[[], Any], beat: Callable[[], None]) -> Any:
    """What rank 0 reads, on all ranks. Raises Exception: it could not; also on all ranks."""
    contents, problem = None, None
    if parallel.rank == 0:
        try:
            contents = read()
        except Exception as error:
            problem = error
    parallel.any(False, beat)  # the others wait here, with signs of life
    said = parallel.share(problem and _describe(problem))
    if said is not None:
        raise problem or _rebuild(*said)
    return give_all(parallel, contents, 0, beat)


def _describe(error: Exception) -> list[str]:
    """An exception as JSON can say it: its type, and the texts that it is made of."""
    if isinstance(error, JobError):
        return [JobError.__name__, error.key, str(error.value), error.problem, error.remedy]
    return [type(error).__name__, str(error)]


def _rebuild(kind: str, *texts: str) -> Exception:
    """The exception of rank 0, as far as it matters to others."""
    if kind == JobError.__name__:
        return JobError(*texts)
    return (
        DamagedCheckpoint(*texts)
        if kind == DamagedCheckpoint.__name__
        else RuntimeError(f"another rank cannot read: {texts[-1]}")
    )


def make_room(row: Row) -> Tensor:
    """A tensor that lies as a row of a table says, filled with anything."""
    _, name, shape, stride = row
    return torch.empty_strided(shape, stride, dtype=getattr(torch, name), device="cpu")


def lay_out(tensors: Sequence[Tensor], rows: Sequence[Row]) -> list[Tensor]:
    """The tensors, copied where they do not lie as the rows say: expanded ones, and parts of others."""
    found = []
    for tensor, row in zip(tensors, rows, strict=True):
        tensor = tensor.resolve_conj().resolve_neg()
        lies = tensor.device.type == "cpu" and tensor.stride() == tuple(row[3])
        found.append(tensor if lies else make_room(row).copy_(tensor))
    return found


def flatten(tensor: Tensor) -> Tensor:
    """The bytes of a tensor without gaps, in the order in which they lie, shape (bytes,)."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def checksum(contents: Any) -> str:
    """Of all dense tensors, in less time than it takes to copy them. Equal states have equal ones."""
    _, tensors = take_apart(contents)
    rows = Layout(tensors).rows
    digest = hashlib.sha256(json.dumps(rows).encode())
    for tensor in map(flatten, lay_out(tensors, rows)):
        data = tensor.numpy()
        words = data[: len(data) // 8 * 8].view(np.int64)
        for begin in range(0, len(words), BLOCK):
            digest.update(words[begin : begin + BLOCK].sum().tobytes())  # whole numbers: the same in any order
        digest.update(data[len(words) * 8 :].tobytes())
    return digest.hexdigest()
