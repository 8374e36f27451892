"""Faults at an exact moment of a rank's training: the rank does them to itself."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

from torch.optim import optimizer

MOMENTS = ("before update", "after update", "in evaluation", "to the whole group")


@dataclass(frozen=True)
class Fault:
    """A signal that one rank sends to itself."""

    count: int
    """At the so-manieth update, or batch of an evaluation, of this attempt; from 1."""
    moment: str = "after update"
    """One of MOMENTS. "before update" n is after step n - 1 and all that followed it, such as its checkpoint.

    "to the whole group" is after an update too, and reaches the rank's loader workers as well.
    """
    number: int = signal.SIGKILL
    rank: int = 0


_armed: dict[str, tuple[int, int]] = {}
_seen = dict.fromkeys(MOMENTS, 0)


def arm(fault: Fault) -> None:
    """Let this process do `fault` when its moment comes."""
    assert fault.moment in MOMENTS
    _armed[fault.moment] = fault.count, fault.number
    optimizer.register_optimizer_step_pre_hook(lambda *_: reach("before update"))
    optimizer.register_optimizer_step_post_hook(lambda *_: reach("after update"))
    optimizer.register_optimizer_step_post_hook(lambda *_: reach("to the whole group"))
    os.setpgid(0, 0)


def reach(moment: str) -> Any:
    """Tell that a moment has come."""
    _seen[moment] += 1
    if moment in _armed and _armed[moment][0] == _seen[moment]:
        target = 0 if moment == "to the whole group" else os.getpid()
        os.kill(target, _armed[moment][1])
