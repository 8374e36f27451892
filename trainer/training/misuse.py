"""What a script may do wrong with its session, each with a remedy."""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config.job import Job
from trainer.errors import WRONG_JOB, JobError
from trainer.parallel.base import Parallel
from trainer.parallel.returned import RESERVED
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


def check_shared(module: nn.Module, wrapped: Sequence[nn.Module]) -> None:
    """Refuse weights that another module has, too: DDP would average their gradients twice. Raises JobError."""
    others = [other for other in wrapped if isinstance(other, DistributedDataParallel) and other is not module]
    known = {id(weight) for other in others for weight in other.parameters()}
    shared = [name for name, weight in module.named_parameters() if weight.requires_grad and id(weight) in known]
    if shared:
        problem = "belongs to a module that is wrapped already"
        raise JobError("session.wrap", shared[0], problem, "Wrap one module that holds both")


def check_shard(job: Job, shard: Any, options: Mapping[str, Any]) -> None:
    """Refuse layers for which there is no mode, and options of another mode. Raises JobError."""
    if job.parallel != "fsdp":
        problem, remedy = "needs parallel=fsdp", 'Set parallel: fsdp in the job, or muster.Session(parallel="fsdp")'
        raise JobError("session.wrap", "shard", problem, remedy)
    if options and shard is not False:
        problem = "is an option of DDP, and this module is sharded"
        raise JobError("session.wrap", ", ".join(options), problem, "Remove it, or give shard=False")


def check_update(updates: bool) -> None:
    """Refuse an update between the micro-batches of one. Raises JobError."""
    if not updates:
        remedy = "Write `if session.updates:` around clipping, optimizer.step() and zero_grad()"
        raise JobError("session.updates", False, "the optimizer steps after a micro-batch that is not the last", remedy)


def check_logged(values: Mapping[str, Any]) -> None:
    """Refuse what is not one number, or a name that is ours. Raises JobError."""
    for name, value in values.items():
        if name in RESERVED and name != "loss":
            remedy = f"Choose another name, such as my_{name}"
            raise JobError("session.log", name, "is a name that every line of metrics.jsonl has already", remedy)
        if isinstance(value, Real) or (
            isinstance(value, (Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1
        ):
            continue
        shown = f"{name}={tuple(value.shape) if isinstance(value, Tensor) else repr(value)[:60]}"
        raise JobError("session.log", shown, "is not one number", "Give its mean, or each of several a name")


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
