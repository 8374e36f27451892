"""How a state lies in a buffer that processes share: its dense tensors, then a head that says what hangs where.

The head is a table of the tensors (JSON) and the state with a `Place` for each of them (what torch.load reads, with
`weights_only`). Sparse and empty tensors, and those of classes that somebody made, are part of it.
"""

import contextlib
import ctypes
import io
import json
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from trainer.checkpoint.memory import Seal
from trainer.data.nested import INSIDE, map_tensors, walk
from trainer.parallel.module_state import is_dense
from trainer.parallel.shards import Part, local, part_of

ALIGN = 64
"""Tensors begin at multiples of it, as torch's own do."""
TABLE = struct.Struct("<q")
"""Bytes of the table, at the beginning of the head."""
Row = tuple[int, str, tuple[int, ...], tuple[int, ...]]
"""Of a table: offset, type, shape, strides."""


@dataclass(frozen=True)
class Place:
    """Stands for a tensor: its row in the table."""

    row: int


def take_apart(contents: Any) -> tuple[Any, list[Tensor]]:
    """The contents with a `Place` for each dense tensor, and those tensors; tied ones are one."""
    tensors: list[Tensor] = []
    places: dict[tuple[Any, ...], Place] = {}

    def place(tensor: Tensor) -> Place | Part | Tensor:
        tensor = tensor.detach()
        if (part := part_of(tensor)) is not None:
            return replace(part, rows=place(part.rows))
        tensor = local(tensor)
        if type(tensor) is not Tensor or not is_dense(tensor) or tensor.is_quantized or not tensor.numel():
            return tensor.cpu()
        origin = tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
        if origin not in places:
            places[origin] = Place(len(tensors))
            tensors.append(tensor)
        return places[origin]

    return map_tensors(contents, place), tensors


def put_together(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """The reverse of `take_apart`."""
    return walk(tree, lambda part: tensors[part.row] if isinstance(part, Place) else INSIDE)


def on_cpu(contents: Any) -> Any:
    """The contents, with tensors in the CPU's memory alone."""
    tree, tensors = take_apart(contents)
    return put_together(tree, [tensor.cpu() for tensor in tensors])


class Layout:
    """Where each tensor of a state begins; states of one training mostly have the same."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.kinds = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
        self.rows: list[Row] = []
        self.size = 0
        for tensor in tensors:
            like = torch.empty_like(tensor, device="meta")  # of an expanded one, without the repetitions
            self.rows.append((self.size, str(tensor.dtype).removeprefix("torch."), tuple(like.shape), like.stride()))
            self.size += -(-like.nbytes // ALIGN) * ALIGN
        table = json.dumps(self.rows).encode()
        self.table = TABLE.pack(len(table)) + table

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors would lie the same."""
        return self.kinds == [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]

    def head(self, tree: Any) -> bytes:
        """The table, and what the tensors hang from."""
        torch.save(tree, buffer := io.BytesIO())
        return self.table + buffer.getbuffer()


def view(memory: Any, rows: Sequence[Row]) -> list[Tensor]:
    """The tensors in a mapped buffer. Each has a storage of its own: torch.save writes storages as a whole."""
    found = []
    for offset, name, shape, stride in rows:
        dtype = getattr(torch, name)
        last = sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        data = torch.frombuffer(memory, dtype=torch.uint8, count=(last + 1) * dtype.itemsize, offset=offset)
        found.append(data.view(dtype).as_strided(shape, stride))
    return found


class Buffer:
    """A buffer that this process fills again and again; it stays mapped."""

    def __init__(self, pinned: bool) -> None:
        """`pinned`: copies from a GPU into it shall not stop the process."""
        self.pinned, self.size = pinned, 0
        self.memory: mmap.mmap | None = None
        self.registered: int | None = None
        self.layout: Layout | None = None
        self.views: list[Tensor] = []

    def write(self, handle: int, layout: Layout, tensors: Sequence[Tensor], tree: Any) -> bytes:
        """Put a state there, behind the descriptor `handle`; return its head. Copies from a GPU may still go on."""
        head = layout.head(tree)
        self._reserve(handle, layout.size + len(head))
        assert self.memory is not None
        if self.layout is not layout:
            self.layout, self.views = layout, view(self.memory, layout.rows)
        for kept, tensor in zip(self.views, tensors, strict=True):
            kept.copy_(tensor, non_blocking=True)
        self.memory[layout.size : layout.size + len(head)] = head
        return head

    def _reserve(self, handle: int, size: int) -> None:
        """Map at least `size` bytes."""
        if size <= self.size:
            return
        self.close()
        self.size = size + size // 64 + mmap.PAGESIZE  # the head's length varies
        os.ftruncate(handle, max(self.size, os.fstat(handle).st_size))  # another session may have mapped more
        self.memory = map_file(handle, self.size)
        if self.pinned:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
            if int(torch.cuda.cudart().cudaHostRegister(address, self.size, 0)) == 0:
                self.registered = address
            else:  # copies wait, then; the next kernel would raise what went wrong here
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda")

    def close(self) -> None:
        """Unmap it."""
        if self.registered is not None:
            torch.cuda.cudart().cudaHostUnregister(self.registered)
        self.registered, self.layout, self.views, self.memory, self.size = None, None, [], None, 0


def map_file(handle: int, size: int) -> mmap.mmap:
    """Map what is behind a descriptor. Python keeps a copy of the one that it is given, and its lock with it."""
    with open(f"/proc/self/fd/{handle}", "r+b") as file:
        return mmap.mmap(file.fileno(), size)


def read_raw(handle: int, seal: Seal) -> tuple[bytes, mmap.mmap]:
    """A state that lies behind a descriptor: its head, and the memory of its tensors."""
    memory = map_file(handle, seal.offset + seal.size)
    return memory[seal.offset :], memory


def interpret(head: bytes, memory: Any) -> tuple[Any, list[Tensor]]:
    """The state that was put somewhere, taken apart; the tensors are in that memory."""
    tree, rows = read_head(head)
    return tree, view(memory, rows)


def read_head(head: bytes) -> tuple[Any, list[Row]]:
    """What a head says: what the tensors hang from, and how each of them lies."""
    start = TABLE.size + TABLE.unpack_from(head)[0]
    with safe_globals([Place, Part]):
        tree = torch.load(io.BytesIO(head[start:]), map_location="cpu", weights_only=True)
    return tree, json.loads(head[TABLE.size : start])
