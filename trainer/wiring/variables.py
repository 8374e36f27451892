"""Every environment variable of Muster, of ranks and of schedulers, by name: who sets it, and what it says.

`trainer.wiring` alone reads them; other modules ask the functions below. What torch, NCCL and CUDA read for
themselves is decided where it is set (`trainer.agent.rank_environment`, `launch/fabrics.yaml`).
"""

import os
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import JobError

# Set by a platform for the agent of a node.
PLATFORM = "MUSTER_PLATFORM"
JOB_ID = "MUSTER_JOB_ID"
NODES = "MUSTER_NODES"
NODE_RANK = "MUSTER_NODE_RANK"
HOSTNAMES = "MUSTER_HOSTNAMES"
LOCAL_TASK = "MUSTER_LOCAL_TASK"  # never set: the one task of a node is number 0. submitit wants a name to ask for
LAUNCH = "MUSTER_LAUNCH"  # how often the platform has started the job again
RUN = "MUSTER_RUN"  # the run folder
RUN_SHARED = "MUSTER_RUN_SHARED"  # 0 where the run folder goes with the node
BY_HAND = "MUSTER_BY_HAND"  # 1 where the platform's own tool started the job: its name alone says which run it is
VISIBLE_DEVICES = "MUSTER_VISIBLE_DEVICES"  # GPUs that a container was given, as it numbers them
TERMINATION_LOG = "MUSTER_TERMINATION_LOG"  # the file whose text Kubernetes shows when a container has ended
SECRET = "MUSTER_SECRET"  # by which the agents of a run know each other; see `trainer.wiring.secret`
SECRET_FILE = "MUSTER_SECRET_FILE"  # a file that holds it
SETUP = "MUSTER_SETUP"  # a shell script that `slurm/job.sbatch` sources on each node

# Set by the agent for its ranks.
ATTEMPT = "MUSTER_ATTEMPT"
HEARTBEAT = "MUSTER_HEARTBEAT"  # the file in which the ranks of a node give signs of life
SESSION = "MUSTER_SESSION"  # the job file for sessions in a script; of a run it lies in the run folder
MEMORY = "MUSTER_MEMORY"  # the files in memory where the states of a node's ranks are kept
WRITER = "MUSTER_WRITER"  # the socket of whoever starts the process that writes checkpoints

# Set by whoever launches ranks: our agent, torchrun, accelerate, PyTorchJob.
RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
LOCAL_RANK, LOCAL_WORLD_SIZE = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"
RUN_ID = "TORCHELASTIC_RUN_ID"
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # True: ranks are clients of a store that their agent serves
GROUP_RANK = "GROUP_RANK"  # the node's
OF_RANKS = (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
CUDA_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

# Set by Slurm (sbatch(1), srun(1)).
SLURM_CONF = "SLURM_CONF"
SLURM_JOB_ID, SLURM_JOB_NUM_NODES, SLURM_JOB_NODELIST = "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"
SLURM_NODEID, SLURM_RESTART_COUNT, SLURM_JOB_END_TIME = "SLURM_NODEID", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME"
SLURM_STEP_ID, SLURM_STEP_NUM_NODES = "SLURM_STEP_ID", "SLURM_STEP_NUM_NODES"
SLURM_NTASKS, SLURM_PROCID, SLURM_GPUS_PER_TASK = "SLURM_NTASKS", "SLURM_PROCID", "SLURM_GPUS_PER_TASK"
SLURM_ARRAY_TASK_ID = "SLURM_ARRAY_TASK_ID"

# Set by Kubernetes' Job controller.
COMPLETION_INDEX = "JOB_COMPLETION_INDEX"

OF_A_JOB = ("SLURM_", "SBATCH_", "SRUN_", "MUSTER_", "SUBMITIT_")
"""How the names begin that a job's processes inherit, and that its submission must not hand to another job."""


OF_A_USER = (
    SLURM_CONF, "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION", "SBATCH_CONSTRAINT",
    "SBATCH_TIMELIMIT",
)  # fmt: skip
"""Those among them that Slurm sets for no job, and people for all of theirs, in their shell's start-up file."""


def read_int(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    """The value of a variable that counts something. Raises JobError: unset without a default, or not a number."""
    text = environ.get(name) or default
    if text is None or not text.isdecimal():
        raise JobError(name, text, "is not a number", "The launcher or template that set it is misconfigured")
    return int(text)


def read_path(name: str) -> Path | None:
    """The value of a variable that holds a path, such as `RUN` or `HEARTBEAT`. None: it is not set."""
    path = os.environ.get(name)
    return Path(path) if path else None


def read_words(name: str) -> list[str]:
    """The value of a variable that holds several paths: `MEMORY`. Empty: it is not set."""
    return os.environ.get(name, "").split()


def group_rank() -> int:
    """The number of the node that this process is a rank of, or of the rank, where a launcher counts no nodes."""
    text = os.environ.get(GROUP_RANK) or os.environ.get(RANK) or ""
    return int(text) if text.isdecimal() else 0


def run_is_shared() -> bool:
    """Whether all nodes see the run folder, and it outlives them. A platform without a shared volume says no."""
    return os.environ.get(RUN_SHARED) != "0"


def is_by_hand() -> bool:
    """Whether nobody made the run folder for this submission, so that it may be that of an earlier one."""
    return os.environ.get(BY_HAND) == "1"


def is_placed() -> bool:
    """Whether a platform or Slurm started this process as part of a job."""
    return bool(os.environ.get(PLATFORM) or (os.environ.get(SLURM_JOB_ID) and os.environ.get(SLURM_NODEID)))


def array_task() -> str | None:
    """The number of this task of a Slurm array; None outside one."""
    return os.environ.get(SLURM_ARRAY_TASK_ID)


def without_ranks() -> dict[str, str]:
    """The environment without what makes a process a rank: we may run inside one, or in a shell that played one."""
    dropped = {name for name in os.environ if name.startswith("TORCHELASTIC_")} | {*OF_RANKS, LOCAL_WORLD_SIZE, ATTEMPT}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def without_job() -> dict[str, str]:
    """The environment for submitting a job from inside another: without that one's variables and its GPU mask."""
    dropped = {name for name in os.environ if name.startswith(OF_A_JOB)} - {*OF_A_USER} | {CUDA_VISIBLE_DEVICES}
    return {name: value for name, value in os.environ.items() if name not in dropped}
