"""A task that does what a test orders while it runs: the file `orders/rank-<r>` of its run folder has a word."""

from __future__ import annotations

import ctypes
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from trainer.errors import JobError
from trainer.task import Task
from trainer.tasks.digits import load_digits

COUNT = 240


def _raise() -> None:
    raise KeyError("no such digit")


def _memory() -> None:
    bytearray(1 << 60)


def _tensor_memory() -> None:
    torch.empty(1 << 50)


def _shm() -> None:
    raise RuntimeError(
        "DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's workers are out "
        "of shared memory. Please try to raise your shared memory limit."
    )


def _job_error() -> None:
    raise JobError("task_args.width", 7, "does not fit these images", "Use 8")


def _deadlock() -> None:
    """Wait for oneself, holding the interpreter's lock (PyDLL); no signal interrupts it."""
    lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)


FAULTS: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "exit 3": lambda: sys.exit(3),
    "exit 0": lambda: sys.exit(0),
    "leave": lambda: os._exit(0),
    "memory": _memory,
    "tensor memory": _tensor_memory,
    "shm": _shm,
    "job error": _job_error,
    "crash": lambda: ctypes.string_at(8),
    "hang": lambda: time.sleep(3600),
    "hang in C": _deadlock,
    "skip": dist.barrier,  # which the others do not call: they wait in the step's own collective
}


class Orders:
    """What this rank is to do next."""

    def __init__(self) -> None:
        self.file = Path(os.environ.get("MUSTER_RUN", "/nonexistent"), "orders", f"rank-{os.environ.get('RANK', '0')}")

    def obey(self, *words: str) -> None:
        """Do what was ordered, once, if it is one of the words."""
        if self.file.exists() and (word := self.file.read_text()) in words:
            self.file.unlink()
            FAULTS[word.removeprefix("load: ")]()


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Digits, read one by one."""

    deterministic = True

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.images, self.labels = (tensor[:COUNT] for tensor in load_digits())

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.orders.obey("load: hang", "load: raise")
        return self.images[index], self.labels[index]


class Faulty(Task):
    """A linear layer on digits, with dropout; `step_s`: seconds that a step takes at least.

    `buffers`: batch statistics; `noise`: random numbers of Python's and NumPy's global generators in the loss.
    """

    def __init__(self, step_s: float = 0.0, start_s: float = 0.0, buffers: bool = False, noise: bool = False) -> None:
        self.orders, self.step_s, self.buffers, self.noise = Orders(), step_s, buffers, noise
        time.sleep(start_s)

    def model(self) -> nn.Module:
        """64 inputs, 10 outputs."""
        statistics = [nn.BatchNorm1d(64)] if self.buffers else []
        return nn.Sequential(nn.Flatten(), *statistics, nn.Dropout(0.1), nn.Linear(64, 10))

    def train_dataset(self) -> Images:
        """Some of the digits."""
        return Images(self.orders)

    def eval_dataset(self) -> Images:
        """The same."""
        return Images(self.orders)

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy."""
        self.orders.obey(*FAULTS)
        time.sleep(self.step_s)
        losses = functional.cross_entropy(output, batch[1], reduction="none")
        if self.noise:
            losses = losses * (random.gauss(1, 0.1) + np.random.normal(0, 0.1))
        return losses
