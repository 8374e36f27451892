"""State of all random generators of a rank as one tensor, so that checkpoints load with `weights_only=True`."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.sampler import sample_seed

PYTHON = struct.Struct("<625I?d")
NUMPY = struct.Struct("<624IIId")
TORCH = PYTHON.size + NUMPY.size
"""Where torch's part begins."""
WATCHED = struct.Struct("<5I")
"""Of a Mersenne twister: its index, and some of its words, all of which change when the index starts again."""


def get_state(devices: Sequence[torch.device]) -> Tensor:
    """Pack Python's, NumPy's, torch's and each GPU's generator states: uint8, shape (bytes,)."""
    _, words, gauss = random.getstate()
    python = PYTHON.pack(*words, gauss is not None, gauss or 0.0)
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    inner = state["state"]
    numpy = NUMPY.pack(*inner["key"].tolist(), inner["pos"], state["has_gauss"], state["gauss"])
    parts = [torch.frombuffer(bytearray(python + numpy), dtype=torch.uint8), torch.get_rng_state()]
    parts += [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"]
    return torch.cat(parts)


def set_state(state: Tensor, devices: Sequence[torch.device]) -> None:
    """Restore what `get_state` packed; what is of another kind of device, or of more of them, is left out."""
    raw = bytes(state[:TORCH].numpy())
    *words, has_gauss, gauss = PYTHON.unpack(raw[: PYTHON.size])
    random.setstate((3, tuple(words), gauss if has_gauss else None))
    *keys, position, has_gauss, gauss = NUMPY.unpack(raw[PYTHON.size :])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    rest = state[TORCH:]
    size = torch.get_rng_state().numel()
    torch.set_rng_state(rest[:size].clone())  # a view may be unaligned, which crashes torch
    rest = rest[size:]
    for device in devices:
        if device.type == "cuda" and rest.numel():
            size = torch.cuda.get_rng_state(device).numel()
            torch.cuda.set_rng_state(rest[:size].clone(), device)
            rest = rest[size:]


def seed_all(seed: int, stream: int, rank: int) -> None:
    """Seed every generator of this rank from (seed, stream, rank)."""
    value = sample_seed(seed, stream, rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


class Watch:
    """Tells in a microsecond whether a global generator was used, by looking at bytes of all in memory.

    Reading the states of Python's and NumPy's takes fifty microseconds, that of torch's three, or ten once other work
    has been done in between. What another interpreter or torch keeps elsewhere is not found: then all count as used.
    """

    def __init__(self) -> None:
        """Look for the first time."""
        numpy: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        python = id(random._inst) + object.__basicsize__  # as in CPython's struct
        self.python = (ctypes.c_char * WATCHED.size).from_address(python)
        self.numpy = (ctypes.c_char * WATCHED.size).from_address(numpy.ctypes.state_address + 620 * 4)
        self.seen = self.python.raw, self.numpy.raw
        _, words, gauss = random.getstate()
        state: Any = np.random.get_state(legacy=False)
        expected = (
            WATCHED.pack(words[624], *words[:4]),
            WATCHED.pack(*state["state"]["key"][620:], state["state"]["pos"]),
        )
        # A second normal number, already made, takes no draw.
        self.used = gauss is not None or bool(state["has_gauss"]) or self.seen != expected
        self.torch = find_torch()
        self.last = b""

    def moved(self) -> bool:
        """Whether Python's or NumPy's was used, ever since the watch began."""
        if not self.used and (self.python.raw, self.numpy.raw) != self.seen:
            self.used = True
        return self.used

    def torch_moved(self) -> bool:
        """Whether torch's was used since this was last asked; the first answer is yes."""
        if self.torch is None:
            return True
        now = self.torch.raw
        if now == self.last:
            return False
        self.last = now
        return True


def find_torch() -> Any:
    """The memory in which torch's default generator keeps all that a draw changes, or None.

    c10's `CPUGeneratorImpl` holds a Mersenne twister - seed, words left, whether seeded, next word, words - and then
    the second of two normal numbers, as a float and as a double, each with a flag.
    """
    generator: Any = torch.default_generator
    words = struct.unpack_from("<624Q", generator.get_state().numpy().tobytes(), 24)  # written as 64 bits each
    begin = getattr(generator, "_cdata", 0)
    wanted = struct.pack("<624I", *words)
    offset = ctypes.string_at(begin, 256).find(wanted[:64]) if begin else -1
    if offset < 0:
        return None
    engine = (ctypes.c_char * (12 + len(wanted) + 28)).from_address(begin + offset - 12)
    return engine if engine.raw[12 : 12 + len(wanted)] == wanted else None
