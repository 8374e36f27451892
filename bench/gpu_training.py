"""What `gpu.py` lets take turns: bytelm trained by our trainer, and the same by hand."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from trainer.config.job import Job
from trainer.parallel.modes import make_parallel
from trainer.parallel.step import Step
from trainer.reporting.heartbeat import Pulse
from trainer.reporting.rank_report import Report
from trainer.run.folder import RunFolder
from trainer.tasks.bytelm import ByteLM
from trainer.training.loop import Trainer
from trainer.training.optimizer import autocast
from trainer.wiring.rank import RankWiring


class LongEpochs(ByteLM):
    """Bytelm with its corpus several times over: no epoch, with evaluation and checkpoint, ends within a block."""

    @cached_property
    def corpora(self) -> dict[bool, Tensor]:
        """Of each epoch eight."""
        return {held_out: text.repeat(8) for held_out, text in super().corpora.items()}


class Training:
    """One side of one configuration: a training that goes on by a block at a time."""

    def __init__(self, job: Job, steps: Iterator[None], block_s: float) -> None:
        """Build, compile, warm up; choose the steps of a block, so many that losses are read equally often in each."""
        self.steps, self.deterministic, every = steps, job.train.deterministic == "true", job.log.every_steps
        self.times: list[float] = []  # seconds of a step, for each block
        before = torch.cuda.memory_allocated()
        self.run(every)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.count = every * math.ceil(block_s / (every * self.run(every)))
        self.peak_gib = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)

    def run(self, count: int) -> float:
        """Do a block; return the seconds of a step."""
        torch.use_deterministic_algorithms(self.deterministic)
        synchronize()
        began = time.perf_counter()
        for _ in range(count):
            next(self.steps)
        synchronize()
        return (time.perf_counter() - began) / count


def synchronize() -> None:
    """Wait until the GPU is idle, where there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def make_trainer(job: Job, task: ByteLM, run: Path) -> Trainer:
    """Ours, with its defaults on: metrics, TensorBoard, heartbeat, a look at each loss."""
    run.mkdir()
    parallel = make_parallel(job, RankWiring(), supervised=True)
    torch.manual_seed(0)
    model = task.model().to(parallel.device)
    parallel.wrap(Step(model, task, autocast(job.train.precision, parallel.device), job.train.compile))
    report = Report(job, RunFolder(run), 0, parallel, Pulse(0))
    return Trainer(job, task, parallel, report, model, task.train_dataset(), task.eval_dataset())


def trainer_steps(make: Callable[[], Trainer]) -> Iterator[None]:
    """Our loop, a step at a time."""
    yield from make().train()


def raw_steps(job: Job, task: ByteLM) -> Iterator[None]:
    """The same by hand. It waits for the GPU only to read losses, all of them as often as ours writes them.

    What ours does beyond that, such as its look at each loss one step late, counts as its overhead.
    """
    device, train, windows = torch.device(job.device), job.train, task.train_dataset()
    torch.manual_seed(0)
    model = task.model().to(device)
    betas = tuple(train.optimizer_args["betas"])
    optimizer = torch.optim.AdamW(model.parameters(), train.lr, betas, weight_decay=train.weight_decay, fused=True)
    compute = torch.compile(model) if train.compile else model
    pin = job.data.pin_memory and device.type == "cuda"

    def load() -> Tensor:
        batch = torch.stack([windows[index] for index in torch.randint(len(windows), (train.batch_size,)).tolist()])
        return (batch.pin_memory() if pin else batch).to(device, non_blocking=True)

    batch, losses = load(), []
    for step in itertools.count(1):
        with (autocast(train.precision, device) or nullcontext)():
            logits = compute(batch[:, :-1].long())
            loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].long().flatten())
        batch = load()  # while the GPU computes
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % job.log.every_steps == 0:
            torch.stack(losses).tolist()
            losses.clear()
        yield
