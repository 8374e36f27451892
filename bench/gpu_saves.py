"""What a save costs a training on a GPU, by each way to save."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_training import Training, make_trainer, synchronize
from measure import spread
from torch import Tensor

from trainer.checkpoint.keeper import Keeper
from trainer.config.job import Job
from trainer.tasks.bytelm import ByteLM
from trainer.training.loop import Trainer

Row = dict[str, Any]


def ways_to_save(trainer: Trainer, folder: Path) -> dict[str, Callable[[], Callable[[], None]]]:
    """Each saves what the trainer holds, and returns what waits until all is on disk."""
    state, moments = trainer.state, [value for each in trainer.optimizer.state.values() for value in each.values()]
    tensors = [value for value in (*trainer.model.state_dict().values(), *moments) if isinstance(value, Tensor)]
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]

    def copy() -> Callable[[], None]:
        for kept, tensor in zip(copies, tensors, strict=True):
            kept.copy_(tensor, non_blocking=True)
        synchronize()
        return lambda: None

    def ours(keeper: Keeper) -> Callable[[], None]:
        state.keeper = keeper
        state.save()
        return lambda: keeper.wait(lambda: None)

    def torch_save() -> Callable[[], None]:
        with (folder / "state.pt").open("wb", buffering=0) as file:
            torch.save({"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}, file)
            os.fsync(file.fileno())
        return lambda: None

    def make_keeper(asynchronous: bool) -> Keeper:
        options = replace(trainer.job.checkpoint, asynchronous=asynchronous)
        job = replace(trainer.job, checkpoint=options)
        return Keeper(job, trainer.parallel, trainer.report.run, 0, state.tracked.has_buffers, print)

    waiting, beside = make_keeper(False), make_keeper(True)
    return {"copy to the CPU": copy, "muster": partial(ours, beside),
            "muster, asynchronous=false": partial(ours, waiting), "torch.save": torch_save}  # fmt: skip


def measure_saves(job: Job, task: ByteLM, rounds: int, folder: Path) -> list[Row]:
    """The stall, by which a step that saves is longer, and the steps beside the writing; of each way, in turn."""
    trainer = make_trainer(job, task, folder / "saves")
    training = Training(job, trainer.train(), 0)
    ways = ways_to_save(trainer, folder)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, save in ways.items():
            usual = statistics.median(training.run(1) for _ in range(10))
            began = time.perf_counter()
            wait = save()
            stall = time.perf_counter() - began
            with ThreadPoolExecutor() as pool:
                written = pool.submit(lambda wait=wait: (wait(), time.perf_counter())[1])  # type: ignore[misc]
                beside = statistics.median(training.run(1) for _ in range(10))
            found[name].append((stall, beside / usual, written.result() - began))
    limits = [stall for stall, _, _ in found["copy to the CPU"]]
    return [{
        "way": name, "rounds": rounds, "first_stall_ms": round(1000 * saves[0][0], 1),  # it allocates: counted apart
        "stall_ms": spread([1000 * stall for stall, _, _ in saves[1:]]),
        "ratio": spread([stall / limit for (stall, _, _), limit in zip(saves[1:], limits[1:], strict=True)]),
        "step_beside": spread([beside for _, beside, _ in saves[1:]]),
        "whole_s": spread([whole for _, _, whole in saves[1:]]),
    } for name, saves in found.items()]  # fmt: skip
