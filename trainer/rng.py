"""State of all random generators of a rank as one tensor, so that checkpoints load with `weights_only=True`."""

from __future__ import annotations

import random
import struct

import numpy as np
import torch
from torch import Tensor

from trainer.order import sample_seed

PYTHON = struct.Struct("<625I?d")
NUMPY = struct.Struct("<624IIId")


def get_state(device: torch.device) -> Tensor:
    """Pack Python's, NumPy's, torch's and, on a GPU, CUDA's generator states: uint8, shape (bytes,)."""
    _, words, gauss = random.getstate()
    python = PYTHON.pack(*words, gauss is not None, gauss or 0.0)
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    inner = state["state"]
    numpy = NUMPY.pack(*inner["key"].tolist(), inner["pos"], state["has_gauss"], state["gauss"])
    parts = [torch.frombuffer(bytearray(python + numpy), dtype=torch.uint8), torch.get_rng_state()]
    if device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(device))
    return torch.cat(parts)


def set_state(state: Tensor, device: torch.device) -> None:
    """Restore what `get_state` packed; a part for another kind of device is left out."""
    raw = bytes(state[: PYTHON.size + NUMPY.size].numpy())
    *words, has_gauss, gauss = PYTHON.unpack(raw[: PYTHON.size])
    random.setstate((3, tuple(words), gauss if has_gauss else None))
    *keys, position, has_gauss, gauss = NUMPY.unpack(raw[PYTHON.size :])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    rest = state[PYTHON.size + NUMPY.size :]
    size = torch.get_rng_state().numel()
    torch.set_rng_state(rest[:size].clone())  # a view may be unaligned, which crashes torch
    if device.type == "cuda" and rest.numel() > size:
        torch.cuda.set_rng_state(rest[size:].clone(), device)


def seed_all(seed: int, stream: int, rank: int) -> None:
    """Seed every generator of this rank from (seed, stream, rank)."""
    value = sample_seed(seed, stream, rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
