"""A script on a session, run by this one, in which a signal strikes a rank at exact moments: each of them once per run.

`struck.py FOLDER PLAN SCRIPT ARGUMENT ...`. FOLDER remembers what struck already. Plans, with commas between several:
kill:N     SIGKILL in every step, at one of its N moments after the other: before or after the update of an optimizer or
           an evaluation, or after a call of `log`. One rank after the other, and in every fourth step all ranks at once
kill:N/E   the same in every E-th step, from the first
kill:all   SIGKILL at each of these moments
kill-in:S  SIGKILL in step S, counted from 1, to the last rank
stop-in:S  SIGTERM
calm       nothing
exact      nothing, but CUDA kernels are those that give the same bits in each run
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import optimizer

from trainer.training.session import Session

RECORDED = {"every_steps": 1, "samples": True, "tensorboard": False}


class Strikes:
    """When this rank is struck."""

    def __init__(self, folder: Path, plan: str) -> None:
        self.folder = folder
        self.plans = [part.partition(":")[::2] for part in plan.split(",")]
        self.sessions: list[Session] = []
        self.step, self.turn = -1, 0
        folder.mkdir(parents=True, exist_ok=True)

    def moment(self, *_: Any) -> None:
        """The next moment of this step."""
        if not self.sessions:
            return
        session = self.sessions[-1]
        self.step, self.turn = session.step, self.turn + 1 if session.step == self.step else 0
        for kind, argument in self.plans:
            if self.strikes(session, kind, argument):
                try:
                    (self.folder / f"{self.step}-{self.turn}-{session.rank}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGTERM if kind == "stop-in" else signal.SIGKILL)

    def strikes(self, session: Session, kind: str, argument: str) -> bool:
        """Whether it is this rank's turn."""
        if kind.endswith("-in"):
            return self.step + 1 == int(argument) and self.turn == 0 and session.rank == session.world_size - 1
        if kind != "kill":
            return False
        mine = self.step % 4 == 3 or session.rank == self.step % session.world_size
        moments, _, every = argument.partition("/")
        return mine and (
            argument == "all" or (self.step % int(every or 1) == 0 and self.turn == self.step % int(moments))
        )


def watched(make: Callable[..., None], strikes: Strikes) -> Callable[..., None]:
    """A constructor of sessions that tells of each, and has all its steps recorded."""

    def construct(session: Session, *arguments: Any, **options: Any) -> None:
        make(session, *arguments, **{"log": RECORDED, **options})
        strikes.sessions.append(session)

    return construct


def between(method: Callable[..., Any], *moments: Callable[[], None]) -> Callable[..., Any]:
    """The method, with a moment before it, or none if only one is given, and one after it."""

    def call(*arguments: Any, **options: Any) -> Any:
        for moment in moments[1:]:
            moment()
        result = method(*arguments, **options)
        moments[0]()
        return result

    return call


if __name__ == "__main__":
    _, where, plan, *sys.argv = sys.argv
    if "exact" in plan:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    strikes = Strikes(Path(where), plan)
    for name, made in {
        "__init__": watched(Session.__init__, strikes),
        "log": between(Session.log, strikes.moment),
        "evaluate": between(Session.evaluate, strikes.moment, strikes.moment),
    }.items():
        setattr(Session, name, made)
    optimizer.register_optimizer_step_pre_hook(strikes.moment)
    optimizer.register_optimizer_step_post_hook(strikes.moment)
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
