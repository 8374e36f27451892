"""What ranks tell each other beside gradients: JSON, and the bytes of tensors.

Nothing that a peer sends is unpickled. torch's own collectives for objects would do it, and run what the sender names.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LIMIT = 1 << 26
"""Bytes of JSON in one message."""
PIECE = 1 << 26
"""Bytes of tensors that are on their way at a time: a rank needs no more room than that beside the tensors."""
TENSOR = "\0tensor"
"""In a message, the only key of what stands for a tensor: its type and shape. Its bytes follow after the JSON."""
LENGTH = struct.Struct("<q")


def pack(value: Any) -> bytes:
    """What JSON can say, with tensors in it. Tuples become lists. Raises TypeError: it holds something else."""
    tensors: list[Tensor] = []

    def place(part: Any) -> Any:
        if not isinstance(part, Tensor):
            raise TypeError(f"ranks tell each other numbers, texts, lists and tensors, no {type(part).__name__}")
        tensors.append(part.detach().cpu())
        return {TENSOR: [str(part.dtype).removeprefix("torch."), *part.shape]}

    text = json.dumps(value, default=place).encode()
    if len(text) > LIMIT:
        raise ValueError(f"a message to other ranks has {len(text)} bytes, more than {LIMIT}")
    return b"".join((LENGTH.pack(len(text)), text, *(bytes_of(tensor).numpy().tobytes() for tensor in tensors)))


def unpack(data: Tensor) -> Any:
    """The value in a message, shape (bytes,)."""
    size = LENGTH.unpack(data[: LENGTH.size].numpy().tobytes())[0]
    place = LENGTH.size + size
    if not 0 <= size <= LIMIT or place > len(data):
        raise ValueError(f"a message of {len(data)} bytes from another rank claims {size} bytes of JSON")

    def take(part: dict[str, Any]) -> Any:
        nonlocal place
        if part.keys() != {TENSOR}:
            return part
        name, *shape = part[TENSOR]
        dtype = getattr(torch, name)
        begin, place = place, place + math.prod(shape) * dtype.itemsize
        return data[begin:place].clone().view(dtype).reshape(shape)

    return json.loads(data[LENGTH.size : place].numpy().tobytes(), object_hook=take)


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor in the order of its elements, shape (bytes,)."""
    return tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)


def gather(value: Any, world_size: int) -> list[Any]:
    """The values of all ranks, by their ranks, on each of them. They go around in a ring."""
    data = torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device="cpu"))
    longest = max(int(size) for size in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8, device="cpu") for _ in range(world_size)]
    padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
    padded[: len(data)] = data
    dist.all_gather(parts, padded)
    return [unpack(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def share(value: Any, rank: int, source: int) -> Any:
    """The value of rank `source`, on all ranks."""
    data = torch.frombuffer(bytearray(pack(value if rank == source else None)), dtype=torch.uint8)
    size = torch.tensor([len(data)], dtype=torch.int64, device="cpu")
    dist.broadcast(size, source)
    if rank != source:
        data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
    dist.broadcast(data, source)
    return unpack(data)


def send(value: Any, to: int) -> None:
    """Tell one rank a value."""
    data = torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8)
    dist.send(torch.tensor([len(data)], dtype=torch.int64, device="cpu"), to)
    dist.send(data, to)


def receive(source: int) -> Any:
    """The value that rank `source` sends."""
    size = torch.tensor([0], dtype=torch.int64, device="cpu")
    dist.recv(size, source)
    data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
    dist.recv(data, source)
    return unpack(data)


def hand_out(parts: Sequence[Tensor], rank: int, source: int, device: torch.device, beat: Callable[[], None]) -> None:
    """Give all ranks the bytes of rank `source`, in place, each part of shape (bytes,) on the CPU.

    They travel by `device`, whose network is the fast one. `beat`: signs of life.
    """
    for pieces in cut(parts, PIECE):
        beat()
        joined = torch.cat(list(pieces)).to(device)
        dist.broadcast(joined, source)
        if rank != source:
            for piece, new in zip(pieces, joined.split([len(piece) for piece in pieces]), strict=True):
                piece.copy_(new)


def cut(parts: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """The same bytes in lists of no more than `limit`."""
    pieces: list[Tensor] = []
    room = limit
    for rest in parts:
        while len(rest):
            piece, rest = rest[:room], rest[room:]
            pieces.append(piece)
            room -= len(piece)
            if not room:
                yield pieces
                pieces, room = [], limit
    if pieces:
        yield pieces


def coalesced(change: Callable[[Tensor], object], tensors: Sequence[Tensor]) -> None:
    """Apply a collective to many tensors, in place, as to one tensor of each type."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        change(flat)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def broadcast(flat: Tensor) -> None:
    """Give all ranks what rank 0 has, whatever its type."""
    dist.broadcast(flat.view(torch.uint8), 0)
