"""The contestants of `loop.py`: one training, a step at a time, written by hand, by ours and with each library.

All have the same weights, samples, batch per rank, fused AdamW and float32, and read the loss of every step. Libraries
run with their defaults, in the loop that their documentation shows; `lean` takes from them what they do beside the
loop. One process group serves all, and one process holds all, of which only one runs at any time.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from turns import Thread

from muster import Session
from trainer.checkpoint.memory import Memory
from trainer.config.job import Job, Train
from trainer.config.rules import check_job
from trainer.parallel.base import Parallel
from trainer.parallel.modes import make_parallel
from trainer.parallel.step import Step
from trainer.reporting.heartbeat import Pulse
from trainer.reporting.rank_report import Report
from trainer.run.folder import RunFolder
from trainer.tasks.digits import Digits
from trainer.training.loop import Trainer
from trainer.training.optimizer import autocast
from trainer.wiring.rank import rank_wiring

Run = Callable[[int], None]
"""Does so many steps."""


class Dense(Digits):
    """The digits, with a network so small that a step is mostly Python: convolutions take longer."""

    def model(self) -> nn.Module:
        """Three linear layers."""
        width = self.width
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )


@dataclass(frozen=True)
class Case:
    """What all contestants of a rank are given."""

    task: Digits
    data: TensorDataset
    batch_size: int
    """Global."""
    parallel: Parallel
    """Ours, joined: its process group serves all."""
    folder: Path
    lean: bool
    """Libraries read the raw loop's batches, and Lightning's Trainer leaves out logs, progress and checkpoints."""

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.parallel.world_size

    def make_model(self) -> nn.Module:
        """The same weights for all."""
        torch.manual_seed(0)
        return self.task.model()

    def loader(self) -> DataLoader[Any]:
        """What libraries have their users write, for one process: each rank's share as the batch size."""
        return DataLoader(self.data, batch_size=self.batch_size // self.world_size, shuffle=True)


class Batches:
    """A rank's whole batches of an epoch, each indexed at once: by hand, for samples that lie in memory."""

    def __init__(self, case: Case) -> None:
        """Seeded, for all ranks must have one order."""
        self.images, self.labels = case.data.tensors
        self.size, self.rank, self.share = case.batch_size, case.parallel.rank, case.batch_size // case.world_size
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        """Batches."""
        return len(self.labels) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels."""
        order = torch.randperm(len(self.labels), generator=self.generator)
        for start in range(self.rank * self.share, len(self) * self.size, self.size):
            chosen = order[start : start + self.share]
            yield self.images[chosen], self.labels[chosen]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """As ours makes it, but for one group of parameters in place of two."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)


def join(world_size: int) -> Parallel:
    """Initialise the process group, if there is to be one, by our trainer."""
    return make_parallel(make_job(world_size, world_size), rank_wiring(), supervised=True)


def make_job(world_size: int, batch_size: int) -> Job:
    """All defaults, for so long that it never ends."""
    job = Job(name="bench", task="trainer.tasks.digits:Digits", devices_per_node=world_size, device="cpu",
              train=Train(batch_size=batch_size, epochs=1000))  # fmt: skip
    check_job(job)
    return job


def muster(case: Case) -> Iterator[None]:
    """Ours: metrics, TensorBoard, heartbeat, vote, schedule, copies of the state in case of a failure; evaluation and
    checkpoint at the end of each epoch.
    """
    job = make_job(case.world_size, case.batch_size)
    parallel, model = copy.copy(case.parallel), case.make_model()
    parallel.wrap(Step(model, case.task, autocast(job.train.precision, parallel.device)))
    report = Report(job, RunFolder(case.folder), 0, parallel, Pulse(parallel.local_rank))
    trainer = Trainer(
        job, case.task, parallel, report, model, case.data, case.task.eval_dataset()
    )  # fmt: skip
    for _ in trainer.train():
        if not trainer.position.samples:  # a checkpoint is being written: that CPU time is ours
            trainer.state.keeper.wait(lambda: None)
        yield


def session(case: Case) -> Iterator[None]:
    """The loop by hand with a session around it, under the defaults of a script: what a script pays for it."""
    with Session(case.folder / "session", device="cpu") as session:
        model = session.wrap(case.make_model())
        optimizer = make_optimizer(model)
        session.track(model=model, optimizer=optimizer)
        for images, labels in session.batches(case.data, case.batch_size, epochs=1000):
            if not session.position.samples:  # a checkpoint is being written: that CPU time is ours
                session.state.keeper.wait(lambda: None)
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)
            yield


def raw(case: Case) -> Iterator[None]:
    """By hand, with ready batches: what all ratios are taken to."""
    model, optimizer, batches = *make_raw(case), Batches(case)
    while True:
        for images, labels in batches:
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            yield


def raw_loader(case: Case) -> Iterator[None]:
    """By hand, with torch's DataLoader, as libraries have it: what they add to this is their own."""
    model, optimizer = make_raw(case)
    sampler = DistributedSampler(case.data, case.world_size, case.parallel.rank)
    loader = DataLoader(case.data, batch_size=case.batch_size // case.world_size, sampler=sampler)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()
            yield


def make_raw(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model, wrapped for several ranks, and optimizer; gradients are views of their buckets, as ours are."""
    model = case.make_model()
    if case.world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model, make_optimizer(model)


def steps(
    loader: Iterable[Any], model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], Any]
) -> Iterator[None]:
    """The loop that libraries leave to their users."""
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            backward(loss)
            optimizer.step()
            loss.item()
            yield


def fabric(case: Case) -> Iterator[None]:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=case.world_size, strategy="ddp" if case.world_size > 1 else "auto")
    fabric.launch()
    model = case.make_model()
    model, optimizer = fabric.setup(model, make_optimizer(model))
    loader = Batches(case) if case.lean else fabric.setup_dataloaders(case.loader())
    return steps(loader, model, optimizer, fabric.backward)


def accelerate(case: Case) -> Iterator[None]:
    """Hugging Face accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = case.make_model()
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    loader = Batches(case) if case.lean else accelerator.prepare(case.loader())
    return steps(loader, model, optimizer, accelerator.backward)


def lightning(case: Case, turn: Callable[[], None]) -> None:
    """Lightning's Trainer: logs, checkpoint at the end of each epoch, progress bar with the loss; lean: barebones."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as LightningTrainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.make_model()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            turn()
            images, labels = batch
            loss = functional.cross_entropy(self.model(images), labels)
            if case.lean:
                loss.item()
            else:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self)

    trainer = LightningTrainer(
        accelerator="cpu", devices=case.world_size, strategy="ddp" if case.world_size > 1 else "auto", max_epochs=-1,
        default_root_dir=case.folder, barebones=case.lean,
    )  # fmt: skip
    trainer.fit(Module(), Batches(case) if case.lean else case.loader())


OURS, SESSION, RAW, RAW_LOADER = "muster", "muster, session", "raw", "raw, DataLoader"
LOOPS: dict[str, Callable[[Case], Iterator[None]]] = {
    RAW: raw, RAW_LOADER: raw_loader, OURS: muster, SESSION: session, "Fabric": fabric, "accelerate": accelerate
}  # fmt: skip
PEERS = {"Fabric": "lightning", "Lightning Trainer": "lightning", "accelerate": "accelerate"}
"""Contestant to the package that it needs."""


def begin(name: str, case: Case) -> Run:
    """Set a contestant up."""
    os.environ |= Memory.make().environment()  # the agent's part; each of ours has copies of its own
    if name not in LOOPS:
        return Thread(lambda turn: lightning(case, turn)).run
    loop = LOOPS[name](case)

    def run(count: int) -> None:
        for _ in range(count):
            next(loop)

    return run
