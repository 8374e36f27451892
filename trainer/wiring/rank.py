"""A rank's place, as the launcher that started it tells: ours, torchrun, accelerate, PyTorchJob, srun per GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import JobError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankWiring:
    """One rank's place, as torchrun's variables tell it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    attempt: int = 0
    restarts: int = 0
    """How often its launcher has restarted the ranks."""
    launch: str = ""
    """What is the same for all ranks of a launcher, and for their restarts, but not for another one."""


def is_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher (ours, torchrun, accelerate, PyTorchJob, srun per GPU) has wired this process as a rank.

    Raises:
        JobError: it set some of the variables and not the others.
    """
    present = [name for name in RANK_VARIABLES if environ.get(name)]
    if not {"RANK", "WORLD_SIZE"} & set(present) or _numbers_nodes(environ):
        return False
    missing = [name for name in RANK_VARIABLES if name not in present]
    if missing and missing != ["LOCAL_RANK"]:  # PyTorchJob starts one process per pod and does not number it
        raise JobError(
            missing[0],
            None,
            f"is not set, but {', '.join(present)} are: a partial environment",
            "Unset them to let Muster wire the ranks, or start by torchrun, which sets all of them",
        )
    return True


def _numbers_nodes(environ: Mapping[str, str]) -> bool:
    """Whether RANK and WORLD_SIZE, if set, number nodes, and this process is the agent of one.

    Our templates start nothing but agents. On Slurm enroot's hook 50-slurm-pytorch.sh sets both for every task, and
    one task on each node is an agent.
    """
    if environ.get("MUSTER_ATTEMPT") or environ.get("TORCHELASTIC_RUN_ID"):
        return False  # set for ranks alone, by our agent and by torchrun
    if environ.get("MUSTER_PLATFORM"):
        return True
    tasks, task = environ.get("SLURM_NTASKS"), environ.get("SLURM_PROCID")
    nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_JOB_NUM_NODES")
    return tasks is not None and tasks == nodes == environ.get("WORLD_SIZE") and task == environ.get("RANK")


def rank_wiring(environ: Mapping[str, str] = os.environ) -> RankWiring:
    """This rank's place; alone when no launcher said anything.

    Raises:
        JobError: a partial or contradictory environment.
    """
    if not is_rank(environ):
        return RankWiring()
    rank, world_size = number(environ, "RANK"), number(environ, "WORLD_SIZE")
    local_rank = number(environ, "LOCAL_RANK", "0")
    for name, value, size_name, size in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", number(environ, "LOCAL_WORLD_SIZE", str(world_size))),
    ):
        if value >= size:
            raise JobError(
                name,
                value,
                f"contradicts {size_name}={size}",
                "Both are set by the launcher that started this process: it must count from 0",
            )
    attempt = "MUSTER_ATTEMPT" if environ.get("MUSTER_ATTEMPT") else "TORCHELASTIC_RESTART_COUNT"
    restarts, run_id = "TORCHELASTIC_RESTART_COUNT", environ.get("TORCHELASTIC_RUN_ID") or "none"
    return RankWiring(
        rank, world_size, local_rank, number(environ, attempt, "0"), number(environ, restarts, "0"),
        run_id if run_id != "none" else f"launcher-{os.getppid()}",
    )  # fmt: skip


def number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    """The value of a variable that counts something; an empty one is not set."""
    text = environ.get(name) or default
    if text is None or not text.isdecimal():
        raise JobError(name, text, "is not a number", "The launcher or template that set it is misconfigured")
    return int(text)
