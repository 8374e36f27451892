"""Quick checks on the node before ranks are forked: each problem with its remedy, in well under a second.

Whether the nodes reach each other is proven by the rendezvous itself, which waits with progress shown.
"""

import os
import resource
import shutil
import socket
from dataclasses import dataclass

from trainer.agent.kv_server import STRANGERS
from trainer.agent.scratch_folder import SHM
from trainer.checkpoint.memory import BUFFERS, FOR_SHARDS
from trainer.config.job import Job
from trainer.wiring.devices import gpu_files, has_infiniband
from trainer.wiring.hardware import WORKER_SHM_MB, free_memory
from trainer.wiring.node import Wiring

LOOPBACK = "lo"
"""Linux' interface of the machine to itself."""
OPEN_FILES = 40
"""What an agent or a rank has open at least: libraries, logs, the connections of a process group."""
CONNECTIONS_TO_STORE = 2
"""Of each rank: of its process group, and of the thread by which ranks agree to stop."""

MORE_CPUS = {
    "slurm": "Ask for more (cpus_per_device in the site file), and pass --cpus-per-task to srun too",
    "kubernetes": "Raise cpu in the site file",
    "docker": "Give the containers more (docker run --cpus)",
}
"""By platform, what gives an agent more processors."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do."""

    kind: str
    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{'ERROR' if self.fatal else 'WARNING'} [{self.kind}] {self.text}"


def check_node(job: Job, wiring: Wiring, state: int = 0) -> list[Problem]:
    """Look at shared memory, devices, locked memory, compiler, open files, memory and processors of this node.

    `state`: bytes of the newest checkpoint of a run that goes on, 0 where there is none.
    """
    problems, ranks, wanted = [], job.ranks_per_node, job.devices_per_node
    loaders = job.data.workers * ranks if job.task and SHM.is_dir() else 0
    if loaders and (free := shutil.disk_usage(SHM).free / 2**20) < (needed := loaders * WORKER_SHM_MB):
        text = f"/dev/shm has {free:.0f} MiB free; {loaders} loader workers may need {needed}. Enlarge it (docker: "
        text += "--shm-size; Kubernetes: a Memory emptyDir on /dev/shm) or set data.workers=0"
        problems.append(Problem("shm", text))
    if job.device == "cuda" and (gpus := len(gpu_files())) < wanted:
        text = f"devices_per_node={wanted} with device=cuda, but this node has {gpus} GPUs"
        problems.append(Problem("config", f"{text}. Ask for fewer, or set device=cpu"))
    lockable, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if has_infiniband() and lockable != resource.RLIM_INFINITY and lockable < 2**30:
        text = f"InfiniBand is here, but memlock is limited to {lockable >> 10} KiB: RDMA registration will fail"
        problems.append(Problem("interface", f"{text}. Use ulimit -l unlimited (docker: --ulimit memlock=-1)", False))
    compiler = os.environ.get("CXX", "g++")
    if job.task and job.train.compile and not (job.device != "cpu" and gpu_files()) and not shutil.which(compiler):
        text = f"train.compile=true needs a C++ compiler, and this node has no {compiler}"
        problems.append(Problem("config", f"{text}. Install one, name it in CXX, or set train.compile=false"))
    problems += _check_open_files(job, wiring)
    # Of shards there is a copy more, and each node has those of its ranks.
    whole = job.parallel != "fsdp" or job.fsdp.replicate == "node"
    count = BUFFERS if job.parallel != "fsdp" else FOR_SHARDS
    copies = count * state // (1 if whole else job.nodes) if job.checkpoint.in_memory else 0
    free = free_memory()
    if copies > free:
        text = f"{count} copies of the state in memory take {copies >> 20} MiB, and {free >> 20} MiB are free. Ask for "
        text += (
            "more memory, or set checkpoint.in_memory=false: then a failure costs the steps since the last checkpoint"
        )
        problems.append(Problem("memory", text, False))
    if wiring.cpus < ranks:
        text = f"{ranks} ranks share {wiring.cpus} CPUs. {MORE_CPUS.get(wiring.platform, 'Give them more')}"
        problems.append(Problem("config", text, False))
    return problems


def _check_open_files(job: Job, wiring: Wiring) -> list[Problem]:
    """Of the process that may need most: an agent, a rank with loader workers, or on node 0 who serves the others."""
    ranks, world = job.ranks_per_node, job.ranks_per_node * wiring.nodes
    uses = {
        f"{ranks} ranks": 8 * ranks,
        f"data.workers={job.data.workers}": job.data.workers * (6 + 2 * job.data.prefetch) if job.task else 0,
    }
    if wiring.node_rank == 0 and wiring.nodes > 1:
        uses[f"the connections of {world} ranks to their store"] = CONNECTIONS_TO_STORE * world
        uses[f"the agents of {wiring.nodes} nodes"] = 8 * ranks + 2 * wiring.nodes + STRANGERS
    what, most = max(uses.items(), key=lambda use: use[1])
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # the agent has raised it as far as it may
    needed = OPEN_FILES + most
    if files == resource.RLIM_INFINITY or files >= needed:
        return []
    text = f"a process may open {files} files here, and {needed} may be needed for {what}. "
    return [
        Problem("files", f"{text}Raise the hard limit (ulimit -Hn; docker: --ulimit=nofile={needed}), or lower that")
    ]


def network_settings(wiring: Wiring) -> dict[str, tuple[str, str]]:
    """Variables that the network needs, each with value and reason; usually none."""
    if wiring.nodes == 1:
        return {"GLOO_SOCKET_IFNAME": (LOOPBACK, "one node: no need for the host's name to resolve")}
    if wiring.platform == "local":
        reason = "simulated nodes live on this machine's loopback"
        nccl = f"={LOOPBACK}", f"{reason}, which NCCL skips"
        return {"GLOO_SOCKET_IFNAME": (LOOPBACK, reason), "NCCL_SOCKET_IFNAME": nccl}
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = ""
    if wiring.interface not in ("", LOOPBACK) and (not own or own.startswith("127.")):
        reason = f"this host's own name resolves to {own or 'nothing'}; {wiring.interface} routes to the master"
        return {"GLOO_SOCKET_IFNAME": (wiring.interface, reason)}
    return {}
