"""Faults at an exact moment of a rank's training: the rank does them to itself, or plays the world around it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.optim import optimizer

from trainer.run.attempts import claim, newest
from trainer.run.folder import RunFolder

MOMENTS = ("before update", "after update", "in evaluation")


def supersede(folder: Path) -> None:
    """Somebody starts a later attempt of the run."""
    claim(RunFolder(folder), newest(RunFolder(folder)) + 1)


def fill_disk(folder: Path) -> None:
    """Somebody fills the disk but for a page."""
    with (folder / "ballast").open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(b"x" * 4096)
        except OSError:
            ballast.truncate(ballast.tell() - 4096)


@dataclass(frozen=True)
class Fault:
    """Something that happens to one rank, once."""

    count: int
    """At the so-manieth update, or batch of an evaluation, of this attempt; from 1."""
    moment: str = "after update"
    """One of MOMENTS. "before update" n is after step n - 1 and all that followed it, such as its checkpoint."""
    number: int = signal.SIGKILL
    """The signal that the rank gets."""
    rank: int = 0
    group: bool = False
    """Whether the rank's child processes get the signal too."""
    event: Callable[[Path], None] | None = None
    """What happens instead of a signal; it is given the run folder."""


_armed: list[Callable[[str], None]] = []


def arm(fault: Fault, folder: Path) -> None:
    """Let this process do `fault` when its moment comes."""
    assert fault.moment in MOMENTS
    os.setpgid(0, 0)
    left = fault.count

    def strike(moment: str) -> None:
        nonlocal left
        left -= moment == fault.moment
        if left == 0 and moment == fault.moment:
            if fault.event is not None:
                fault.event(folder)
            else:
                os.kill(0 if fault.group else os.getpid(), fault.number)

    _armed.append(strike)
    optimizer.register_optimizer_step_pre_hook(lambda *_: strike("before update"))
    optimizer.register_optimizer_step_post_hook(lambda *_: strike("after update"))


def batch_evaluated() -> None:
    """Tell that a rank is in an evaluation."""
    for strike in _armed:
        strike("in evaluation")
