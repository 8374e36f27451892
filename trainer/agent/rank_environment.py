"""The variables of a rank: its place, as torchrun would tell it, and defaults for NCCL, torch and OpenMP.

Which variables the network needs on this node is decided in `trainer.agent.preflight`.
"""

import os

from trainer.agent.rounds import Round
from trainer.config.job import Job
from trainer.run.folder import RunFolder
from trainer.wiring import variables as names
from trainer.wiring.node import Wiring


def rank_variables(job: Job, wiring: Wiring, local_rank: int, agreed: Round) -> dict[str, str]:
    """What torchrun sets for a rank, and `MUSTER_ATTEMPT`."""
    each = job.ranks_per_node
    rank, world_size = wiring.node_rank * each + local_rank, wiring.nodes * each
    values = {
        names.RANK: rank, names.LOCAL_RANK: local_rank, names.GROUP_RANK: wiring.node_rank, "ROLE_RANK": rank,
        names.WORLD_SIZE: world_size, names.LOCAL_WORLD_SIZE: each, "GROUP_WORLD_SIZE": wiring.nodes,
        "ROLE_WORLD_SIZE": world_size, "ROLE_NAME": "default",
        names.MASTER_ADDR: agreed.master_addr, names.MASTER_PORT: agreed.master_port,
        names.RUN_ID: wiring.job_id, names.RESTART_COUNT: agreed.number - 1,
        "TORCHELASTIC_MAX_RESTARTS": job.agent.restarts,
        # The ranks, rank 0 too, are clients of the agent's store, which therefore outlives them.
        names.AGENT_STORE: True,
        # A rank whose collective failed ends, instead of waiting for ever (torchrun's default too).
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        names.ATTEMPT: agreed.attempt,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def threads_per_rank(job: Job, wiring: Wiring) -> int:
    """What OMP_NUM_THREADS says; else ranks share the node's processors. More threads than those only fight."""
    ranks = job.ranks_per_node * (wiring.nodes if wiring.platform == "local" else 1)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, wiring.cpus // ranks)


def rank_defaults(run: RunFolder, wiring: Wiring, threads: int) -> dict[str, str]:
    """Defaults for what runs inside a rank; what the site or the user set already wins."""
    defaults = {
        # Warnings go to the rank's log rather than nowhere. A file of their own (NCCL_DEBUG_FILE) would be made by
        # every rank of every attempt, whether there are any or not.
        "NCCL_DEBUG": "WARN",
        # torch's flight recorder: the last collectives of each rank, dumped when one of a script times out (torch 2.9
        # names). Those of a task do not: the agent ends a rank that hangs, and leaves its stacks.
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(run.logs / "flight-recorder-"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        # gloo connects two ranks when they first talk, not each with all others as it starts (torch 2.8 and later).
        "TORCH_GLOO_LAZY_INIT": "1",
        "OMP_NUM_THREADS": str(threads),
        # torch 2.13 restarts read a dead attempt's addresses from a shared store; ours is fresh, this makes sure.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    mask = {names.CUDA_VISIBLE_DEVICES: wiring.visible_devices} if wiring.visible_devices is not None else {}
    return {name: value for name, value in defaults.items() if name not in os.environ} | mask
