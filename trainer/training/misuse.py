"""What a script may do wrong with its session, each with a remedy."""

import os
import sys
from collections.abc import Callable

from trainer.errors import WRONG_JOB, JobError
from trainer.parallel.base import Parallel
from trainer.parallel.stops import Stops
from trainer.wiring.variables import ATTEMPT

LEFT_S = 30.0
"""For the other ranks to leave a loop that one has left."""


def refusal(error: JobError) -> BaseException:
    """How a rank ends that met an error of its user: its agent tells it, and without one the rank does."""
    if os.environ.get(ATTEMPT):
        return error
    print(f"ERROR: {error}", file=sys.stderr, flush=True)
    return SystemExit(WRONG_JOB)


def explain(name: str, origin: str, error: Exception) -> JobError:
    """The error for an object that a checkpoint does not fit."""
    problem = f"does not fit the checkpoint {origin}: {' '.join(str(error).split())}"
    return JobError("session.track", name, problem, "Track what the run began with, or begin a new run")


def check_update(updates: bool) -> None:
    """Refuse an update between the micro-batches of one. Raises JobError."""
    if not updates:
        remedy = "Write `if session.updates:` around clipping, optimizer.step() and zero_grad()"
        raise JobError("session.updates", False, "the optimizer steps after a micro-batch that is not the last", remedy)


def agree_left(stops: Stops, parallel: Parallel, step: int, beat: Callable[[], None]) -> None:
    """Meet the ranks that left a loop. Raises JobError: some go on, or left after another step."""
    if parallel.world_size == 1:
        return
    found = stops.tell("left", str(step), LEFT_S, beat)
    others = {rank: int(text) for rank, text in found.items() if int(text) != step}
    missing = sorted(set(range(parallel.world_size)) - found.keys())
    if others or missing:
        elsewhere = f"rank {missing[0]} goes on" if missing else f"others after {others}"
        remedy = "Leave it on all ranks at once, such as by `if session.any(flag): break`"
        raise JobError(
            "session.batches", f"rank {parallel.rank}", f"left the loop after step {step}, {elsewhere}", remedy
        )
