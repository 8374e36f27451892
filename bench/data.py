"""Loading data: the trainer's way of a batch, from the order of samples to the device, against torch's DataLoader.

Both read the same samples, an epoch by turns, in one process and its workers. CPU time is that of all of them. A wait
is the time from asking for a batch to having it, after a step that computes matrix products on one thread; the first
wait of an epoch, which nothing can be read ahead of, does not count, but to the time of an epoch it does.

    python bench/data.py [--rounds 7] [--output bench/results/data.json]
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from measure import show, spread, table
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainer.config.job import Data
from trainer.data.device_mover import DeviceMover
from trainer.data.loader import Loader
from trainer.data.sampler import Position, Sampler
from trainer.task import Task
from trainer.tasks.digits import Digits
from trainer.tasks.segment import Canvases, FreshCanvases, Segment

STEPS = {0.0: 90, 0.003: 40, 0.03: 12}
"""Seconds of a step, nearly: steps of an epoch. Without a step, the time of an epoch is measured, not the waits."""
Epoch = Callable[[int], Iterator[Any]]
"""The batches of the epoch of a number."""


class PlainCanvases(Canvases):
    """Different in every epoch as most people write it: one generator, which no checkpoint could bring back."""

    rng = np.random.default_rng()

    def __getitem__(self, index: int) -> Any:
        """A fresh canvas."""
        return self.compose(index, self.rng)


class GlobalCanvases(Canvases):
    """The same from NumPy's global generator, which the trainer has to seed around each sample."""

    deterministic = False

    def __getitem__(self, index: int) -> Any:
        """A fresh canvas."""
        return self.compose(index, np.random.default_rng(np.random.randint(2**31)))


@dataclass
class Case:
    """A dataset of so many samples as we read it and as the DataLoader does."""

    name: str
    task: Task
    batch_size: int
    ours: Callable[[Any, int], Dataset[Any]]
    plain: Callable[[Any, int], Dataset[Any]]
    workers: int = 0
    longer: int = 1
    """Times as many steps in an epoch without a step, so that it can be timed."""


def tensors(task: Digits, count: int) -> TensorDataset:
    """Digits, over and over."""
    copies = -(-count // len(task.labels))
    return TensorDataset(task.images.repeat(copies, 1, 1, 1)[:count], task.labels.repeat(copies)[:count])


def canvases(kind: type[Canvases]) -> Callable[[Segment, int], Canvases]:
    """Canvases of the first digits."""
    return lambda task, count: kind(task.images[:count], task.labels[:count], task.size, task.digits)


def make_cases() -> list[Case]:
    """Batches are as large as in the job files."""
    digits, segment = Digits(), Segment()
    fresh, plain, shared = canvases(FreshCanvases), canvases(PlainCanvases), canvases(GlobalCanvases)
    return [
        Case("tensors in memory", digits, 64, tensors, tensors, longer=10),
        Case("composed images, generator given", segment, 16, fresh, plain),
        Case("composed images, generator given", segment, 16, fresh, plain, workers=2),
        Case("composed images, global generator", segment, 16, shared, shared),
    ]


def make_ours(case: Case, count: int) -> tuple[Epoch, Loader]:
    """As `Trainer.epoch` does it on one rank; the loader must be closed."""
    loader = Loader(case.ours(case.task, count), case.task, Data(workers=case.workers), 0, pin=False)
    order = Sampler(count, case.batch_size, 1, 0, 1, 0)
    mover = DeviceMover(torch.device("cpu"), None, False, Data().prefetch)

    def epoch(number: int) -> Iterator[Any]:
        plan = list(order.epoch(Position(epoch=number)))
        return mover.move(loader.read((micro.epoch, micro.indices) for micro in plan))

    return epoch, loader


def make_plain(case: Case, count: int) -> Epoch:
    """The DataLoader; its workers are kept from one epoch to the next, as ours are."""
    dataset, keep = case.plain(case.task, count), case.workers > 0
    loader = DataLoader(dataset, case.batch_size, shuffle=True, num_workers=case.workers, persistent_workers=keep)
    return lambda number: iter(loader)


def cpu_s(pids: list[int]) -> float:
    """CPU time of this process and of others that still run: clock_getcpuclockid(3)."""
    used, clock = time.process_time(), ctypes.c_int()
    for pid in pids:
        if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
            raise SystemExit(f"the loader's worker {pid} has ended")
        used += time.clock_gettime(clock.value)
    return used


def make_step(seconds: float) -> Callable[[], float]:
    """A step of a training on one core; returns its seconds."""
    left = torch.randn(256, 256)

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            left @ left
        return time.perf_counter() - began

    count = round(seconds / (min(run(20) for _ in range(20)) / 20))
    return lambda: run(count)


def read(epoch: Epoch, number: int, step: Callable[[], float], pids: list[int]) -> dict[str, float]:
    """One epoch: seconds, CPU seconds, mean seconds that a step waited."""
    waits, used, began = [], cpu_s(pids), time.perf_counter()
    batches, before = epoch(number), began
    while next(batches, None) is not None:
        waits.append(time.perf_counter() - before)
        step()
        before = time.perf_counter()
    return {"wall": time.perf_counter() - began, "cpu": cpu_s(pids) - used, "wait": statistics.mean(waits[1:])}


def compare(case: Case, step_s: float, rounds: int) -> list[dict[str, Any]]:
    """A row of samples/s by CPU and by wall time without a step, or of the wait beside one."""
    count = STEPS[step_s] * case.batch_size * (1 if step_s else case.longer)
    step = make_step(step_s)
    started = set(multiprocessing.active_children())
    ours, loader = make_ours(case, count)
    ways = {"ours": ours, "plain": make_plain(case, count)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    pids: dict[str, list[int]] = {name: [] for name in ways}
    try:
        for number in range(rounds + 1):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                result = read(ways[name], number, step, pids[name])
                if number:
                    found[name].append(result)
                    continue
                workers = set(multiprocessing.active_children()) - started  # the first epoch starts them: not counted
                pids[name] = [worker.pid for worker in workers if worker.pid]
                started |= workers
    finally:
        loader.close()
    if step_s:
        return [
            summarize(case, f"wait in a {1000 * step_s:.0f} ms step, ms", found, lambda result: 1e3 * result["wait"])
        ]
    return [
        summarize(case, "1000 samples/s, CPU time", found, lambda result: count / 1000 / result["cpu"]),
        summarize(case, "1000 samples/s, wall time", found, lambda result: count / 1000 / result["wall"]),
    ]


def summarize(
    case: Case, what: str, found: dict[str, list[dict[str, float]]], value: Callable[[dict[str, float]], float]
) -> dict[str, Any]:
    """One figure of both ways, and its ratio round by round."""
    ours, plain = ([value(result) for result in found[name]] for name in ("ours", "plain"))
    return {
        "dataset": case.name, "workers": case.workers, "batch_size": case.batch_size, "rounds": len(ours),
        "measure": what, "ours": spread(ours), "plain": spread(plain),
        "ratio": spread([a / b for a, b in zip(ours, plain, strict=True)]),
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "data.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for case in make_cases() for step_s in STEPS for row in compare(case, step_s, options.rounds)]
    print(table([["dataset", "workers", "measure", "muster", "DataLoader", "muster / DataLoader"], *(
        [row["dataset"], str(row["workers"]), row["measure"], *(show(row[key]) for key in ("ours", "plain", "ratio"))]
        for row in rows
    )]))  # fmt: skip
    print(f"one rank; it and its workers share {len(os.sched_getaffinity(0))} cores; higher is better, but for waits")
    measure.write_results(options.output, rows=rows)


if __name__ == "__main__":
    main()
