"""Small scripts on a session, each with one mistake, and processes that run them as python or torchrun would."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ranks import Run, free_port, start, wait
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import muster
from trainer.training import misuse


class Parts:
    """A session with a model and an optimizer on it."""

    def __init__(self, session: muster.Session) -> None:
        self.session = session
        self.model = session.wrap(nn.Linear(1, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        session.track(model=self.model, optimizer=self.optimizer)

    def step(self, batch: tuple[Tensor]) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        self.model(batch[0]).square().mean().backward()
        self.optimizer.step()


def numbers(count: int = 12) -> TensorDataset:
    """So many samples of one number."""
    return TensorDataset(torch.arange(count, dtype=torch.float32).unsqueeze(1))


@contextmanager
def parts(folder: Path, **settings: Any) -> Iterator[Parts]:
    """As a script begins."""
    with muster.Session(run=folder / "run", log={"tensorboard": False, "samples": True}, **settings) as session:
        yield Parts(session)


def calm(folder: Path) -> None:
    """No mistake."""
    with parts(folder) as made:
        for batch in made.session.batches(numbers(), 4, epochs=2):
            made.step(batch)


def stops(folder: Path, count: int = 12) -> None:
    """No mistake: it is asked to."""
    with parts(folder) as made:
        for batch in made.session.batches(numbers(count), 4, epochs=2):
            made.step(batch)
            os.kill(os.getpid(), signal.SIGTERM)


def tracks_late(folder: Path) -> None:
    """After the first batch."""
    with parts(folder) as made:
        for batch in made.session.batches(numbers(), 4, epochs=2):
            made.step(batch)
            made.session.track(more=nn.Linear(1, 1))


def tracks_a_number(folder: Path) -> None:
    """Which has no `state_dict`."""
    with parts(folder) as made:
        made.session.track(count=3)


def updates_too_often(folder: Path) -> None:
    """For every micro-batch."""
    with parts(folder) as made:
        for batch in made.session.batches(numbers(), 4, epochs=2, accumulate=2):
            made.step(batch)


def leaves_early(folder: Path) -> None:
    """The last rank, while the others go on."""
    misuse.LEFT_S = 1.0  # instead of half a minute
    with parts(folder) as made:
        for batch in made.session.batches(numbers(), 4, epochs=2):
            made.step(batch)
            if made.session.step == 1 and made.session.rank == made.session.world_size - 1:
                break


def skips_a_batch(folder: Path) -> None:
    """The last rank does not learn from it."""
    with parts(folder) as made:
        for batch in made.session.batches(numbers(), 4, epochs=2):
            if made.session.step == 1 and made.session.rank == made.session.world_size - 1:
                continue
            made.step(batch)


def loops_in_a_loop(folder: Path) -> None:
    """Two at once."""
    with parts(folder) as made:
        for batch in made.session.batches(numbers(), 4, epochs=2):
            made.step(batch)
            for other in made.session.batches(numbers(), 4, epochs=2):
                made.step(other)


def loops_after_a_loop(folder: Path) -> None:
    """In the same epoch."""
    with parts(folder) as made:
        for _ in made.session.epochs(2):
            for batch in made.session.batches(numbers(), 4):
                made.step(batch)
            for batch in made.session.batches(numbers(3), 4):
                made.step(batch)


def logs_a_list(folder: Path) -> None:
    """As schedulers give one."""
    with parts(folder) as made:
        for batch in made.session.batches(numbers(), 4, epochs=2):
            made.step(batch)
            made.session.log(rate=[0.01])


def forgets_with(folder: Path) -> None:
    """So nobody ends the session."""
    made = Parts(muster.Session(run=folder / "run"))
    for batch in made.session.batches(numbers(), 4, epochs=2):
        made.step(batch)


def catches_all(folder: Path) -> None:
    """It is asked to stop, and does not see it; its schedule is made when its optimizer is restored already."""
    with parts(folder) as made:
        schedule = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda step: step + 1.0)
        made.session.track(schedule=schedule)
        try:
            for batch in made.session.batches(numbers(), 4, epochs=2):
                print("rate", round(100 * made.optimizer.param_groups[0]["lr"]), flush=True)
                made.step(batch)
                schedule.step()
                if made.session.step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            print("caught", error)


def leaves_a_loop_for_another(folder: Path) -> None:
    """In the middle of an epoch; the other has other data."""
    with parts(folder) as made:
        for batch in made.session.batches(numbers(), 4, epochs=2):
            made.step(batch)
            if made.session.step == 1:
                break
        for batch in made.session.batches(numbers(5), 4, steps=4):
            made.step(batch)


def draws(folder: Path) -> None:
    """No mistake: random numbers of each micro-batch."""
    with parts(folder) as made:
        for _ in made.session.batches(numbers(), 4, accumulate=2):
            print("drawn", torch.rand(1).item())


def evaluates_statistics(folder: Path) -> None:
    """No mistake: batch statistics differ between ranks."""
    with muster.Session(run=folder / "run", log={"tensorboard": False}) as session:
        model = session.wrap(nn.BatchNorm1d(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session.track(model=model, optimizer=optimizer)
        for batch in session.batches(numbers(), 4):
            model(batch[0]).square().sum().backward()
            optimizer.step()
        session.evaluate(numbers(), lambda batch: {"output": model(batch[0])[:, 0]}, batch_size=3)


def shares_weights(folder: Path) -> None:
    """Two wrapped modules have a layer in common."""
    layer = nn.Linear(1, 1)
    with muster.Session(folder / "run") as session:
        for _ in range(2):
            session.wrap(nn.Sequential(layer))


def breaks_after_an_update(folder: Path) -> None:
    """What was learnt counts: the run goes on behind it. It ends by `sys.exit`, too."""
    with parts(folder, checkpoint={"every_steps": 1}) as made:
        before = made.session.step
        for batch in made.session.batches(numbers(), 4, epochs=2):
            made.step(batch)
            if made.session.step == before + 1:
                break
        if before:
            sys.exit(0)


def misspells(folder: Path) -> None:
    """A setting."""
    with parts(folder, checkpoint={"every_step": 3}):
        pass


def misspells_a_section(folder: Path) -> None:
    """A setting that has no others in it."""
    with parts(folder, sede=3):
        pass


def call(function: Callable[..., None], folder: Path, ranks: int = 1, *arguments: Any) -> Run:
    """Call a function of this module in one process, or in several as torchrun starts them."""
    folder.mkdir(exist_ok=True)
    attempt = len(list(folder.glob("rank0-*.log")))
    shared = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    processes = []
    for rank in range(ranks):
        mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(start(_call, function, folder, mine, folder / f"rank{rank}-{attempt}.log", arguments))
    return Run(folder, wait(processes, 60.0), attempt)


def _call(function: Callable[..., None], folder: Path, variables: dict[str, str], log: Path, arguments: Any) -> None:
    os.environ.update(variables)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    function(folder, *arguments)
