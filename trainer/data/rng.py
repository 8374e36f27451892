"""Seeds: whatever is random is a function of the job's seed and of what is computed, so no generator is ever saved.

A sample draws from (seed, epoch, index), a batch that is collated from (seed, epoch, its first index), a training step
from (seed, step, rank) and a batch of an evaluation from (seed, step, number of the batch). Of these a training step
alone depends on the rank: ranks have different dropout masks. Generators that user code makes for itself are seeded
likewise where `trainer.data.generators` finds them.
"""

import functools
import hashlib
import random
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

KEY = struct.Struct("<QQQ")
SAMPLES, COLLATING, STEPS, EVALUATION, DATA = b"", b"collate", b"step", b"evaluation", b"data"
"""Streams that never meet. Initial weights come from the first one, as sample 0 of epoch 0 does."""

BLOCK = 64
"""Steps whose seeds are derived at once: one alone takes ten times as long, with the caches full of the model."""

_bound: Any = random.seed
_python: Any = _bound.__self__
"""The generator behind the functions of `random`."""


def derive_seed(seed: int, first: int, second: int, stream: bytes = SAMPLES) -> int:
    """A seed of 64 bits; neighbours have nothing in common."""
    digest = hashlib.blake2b(KEY.pack(seed, first, second), digest_size=8, person=stream).digest()
    return int.from_bytes(digest, "little")


def derive_step_seed(seed: int, step: int, number: int, stream: bytes = STEPS) -> int:
    """As `derive_seed`, for one step after another."""
    return _derive_block(seed, step // BLOCK, number, stream)[step % BLOCK]


@functools.lru_cache(maxsize=64)
def _derive_block(seed: int, block: int, number: int, stream: bytes) -> list[int]:
    return [derive_seed(seed, step, number, stream) for step in range(block * BLOCK, (block + 1) * BLOCK)]


def seed_generators(value: int, devices: Sequence[torch.device] = ()) -> None:
    """Seed the global generators of `random`, NumPy, torch and those `devices` that are GPUs; 8 microseconds on a CPU.

    `torch.manual_seed` takes ten times as long: it looks for every kind of device there is.
    """
    super(random.Random, _python).seed(value)  # its own `seed` is written in Python, and three times as slow
    _python.gauss_next = None
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
    for number, device in enumerate(devices):
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed((value + number) % 2**64)  # replicas shall not drop the same units
