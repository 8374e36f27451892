"""A rank's place, as the launcher that started it tells: ours, torchrun, accelerate, PyTorchJob, srun per GPU."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from trainer.errors import JobError
from trainer.wiring import variables as names
from trainer.wiring.variables import read_int


@dataclass(frozen=True)
class RankWiring:
    """One rank's place, as torchrun's variables tell it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    attempt: int = 0
    restarts: int = 0  # how often its launcher has restarted the ranks
    launch: str = ""  # what is the same for all ranks of a launcher, and for their restarts, but not for another one


def is_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has wired this process as a rank. Raises JobError: it set only some of the variables."""
    present = [name for name in names.OF_RANKS if environ.get(name)]
    if not {names.RANK, names.WORLD_SIZE} & set(present) or _numbers_nodes(environ):
        return False
    missing = [name for name in names.OF_RANKS if name not in present]
    if missing and missing != [names.LOCAL_RANK]:  # PyTorchJob starts one process per pod and does not number it
        problem = f"is not set, but {', '.join(present)} are: a partial environment"
        remedy = "Unset them to let Muster wire the ranks, or start by torchrun, which sets all of them"
        raise JobError(missing[0], None, problem, remedy)
    return True


def _numbers_nodes(environ: Mapping[str, str]) -> bool:
    """Whether RANK and WORLD_SIZE, if set, number nodes, and this process is the agent of one.

    Our templates start nothing but agents. On Slurm enroot's hook 50-slurm-pytorch.sh sets both for every task, and
    one task on each node is an agent.
    """
    if environ.get(names.ATTEMPT) or environ.get(names.RUN_ID):
        return False  # set for ranks alone, by our agent and by torchrun
    if environ.get(names.PLATFORM):
        return True
    tasks, task = environ.get(names.SLURM_NTASKS), environ.get(names.SLURM_PROCID)
    nodes = environ.get(names.SLURM_STEP_NUM_NODES) or environ.get(names.SLURM_JOB_NUM_NODES)
    return tasks is not None and tasks == nodes == environ.get(names.WORLD_SIZE) and task == environ.get(names.RANK)


def rank_wiring(environ: Mapping[str, str] = os.environ) -> RankWiring:
    """This rank's place; alone when no launcher said anything. Raises JobError: they are partial or contradictory."""
    if not is_rank(environ):
        return RankWiring()
    world_size = read_int(environ, names.WORLD_SIZE)
    rank, local_rank = read_int(environ, names.RANK), read_int(environ, names.LOCAL_RANK, "0")
    sizes = (names.RANK, rank, names.WORLD_SIZE), (names.LOCAL_RANK, local_rank, names.LOCAL_WORLD_SIZE)
    for name, value, size_name in sizes:
        size = read_int(environ, size_name, str(world_size))
        if value >= size:
            remedy = "Both are set by the launcher that started this process: it must count from 0"
            raise JobError(name, value, f"contradicts {size_name}={size}", remedy)
    restarts = read_int(environ, names.RESTART_COUNT, "0")
    attempt, run_id = read_int(environ, names.ATTEMPT, str(restarts)), environ.get(names.RUN_ID) or "none"
    launch = run_id if run_id != "none" else f"launcher-{os.getppid()}"
    return RankWiring(rank, world_size, local_rank, attempt, restarts, launch)


def serve_store_elsewhere() -> Callable[[str | None], None]:
    """A function for the `init_method` of a process group, to be called before it is joined.

    A script that meets at another port than it was given would wait for ever: there is no store of an agent. So rank 0
    serves one, as without an agent.
    """
    given = os.environ.get(names.MASTER_PORT)

    def choose(url: str | None) -> None:
        tcp = urlsplit(url) if url and url.startswith("tcp:") else None
        if (str(tcp.port) if tcp else os.environ.get(names.MASTER_PORT)) != given:
            os.environ[names.AGENT_STORE] = "False"

    return choose
