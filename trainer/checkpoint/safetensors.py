"""Files of named tensors that no reader can be made to run code by, and of which one tensor can be read alone.

The format is that of safetensors: 8 bytes with the length of the header, the header as JSON, the bytes of the tensors.
Our own few lines, because ours are written from pieces, hashed on the way, and read without another package.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64, "C128": torch.complex128,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")
LIMIT = 1 << 27
"""Bytes of a header, beyond which it is none."""
ALIGN = 64
Kind = tuple[torch.dtype, tuple[int, ...]]
"""Of a tensor: its type and shape."""


def header_of(tensors: Mapping[str, Kind], facts: Mapping[str, str]) -> bytes:
    """What stands before the bytes of these tensors; `facts` are texts about the file."""
    table: dict[str, Any] = {"__metadata__": dict(facts)} if facts else {}
    place = 0
    for name, (dtype, shape) in tensors.items():
        end = place + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(table).encode()
    text += b" " * (-(LENGTH.size + len(text)) % ALIGN)
    return LENGTH.pack(len(text)) + text


def write(tensors: Mapping[str, tuple[Kind, Iterable[Tensor]]], facts: Mapping[str, str], file: Any) -> None:
    """Write tensors, each of which comes in pieces that follow each other: no two are needed at a time."""
    file.write(header_of({name: kind for name, (kind, _) in tensors.items()}, facts))
    for _, pieces in tensors.values():
        for piece in pieces:
            if piece.numel():
                data = piece.detach().cpu().resolve_conj().resolve_neg().contiguous()
                file.write(data.reshape(-1).view(torch.uint8).numpy())


class Tensors(Mapping[str, Tensor]):
    """The tensors in a file. They are in its pages, so what is not looked at is not read; changes stay here."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError: it is no such file."""
        with path.open("rb") as file:
            length = LENGTH.unpack(file.read(LENGTH.size).ljust(LENGTH.size, b"\xff"))[0]
            if length > LIMIT:
                raise ValueError(f"{path} is not a safetensors file")
            self.table: dict[str, Any] = json.loads(file.read(length))
            self.begin = LENGTH.size + length
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.facts: dict[str, str] = self.table.pop("__metadata__", {})

    def __getitem__(self, name: str) -> Tensor:
        row = self.table[name]
        dtype, shape, (begin, end) = DTYPES[row["dtype"]], tuple(row["shape"]), row["data_offsets"]
        count = math.prod(shape) * dtype.itemsize
        if begin < 0 or end - begin != count or self.begin + end > len(self.memory):
            raise ValueError(f"the table of a safetensors file gives {name} a place or size that it cannot have")
        if not count:
            return torch.empty(shape, dtype=dtype, device="cpu")
        data = torch.frombuffer(self.memory, dtype=torch.uint8, count=count, offset=self.begin + begin)
        return data.view(dtype).reshape(shape)

    def __iter__(self) -> Any:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)
