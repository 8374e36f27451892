"""Quick checks on the node before ranks are forked: each problem with its remedy, in well under a second.

Whether the nodes reach each other is proven by the rendezvous itself, which waits with progress shown.
"""

from __future__ import annotations

import os
import resource
import socket
from dataclasses import dataclass

from trainer.agent.scratch_folder import SHM
from trainer.config.job import Job
from trainer.wiring.devices import gpu_files, has_infiniband
from trainer.wiring.hardware import WORKER_SHM_MB
from trainer.wiring.node import Wiring


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do."""

    kind: str
    text: str
    fatal: bool


def check_node(job: Job, wiring: Wiring) -> list[Problem]:
    """Look at shared memory, locked memory, devices and processors of this node."""
    problems = (_shared_memory(job), _devices(job), _locked_memory(), _processors(job, wiring))
    return [problem for problem in problems if problem is not None]


def _shared_memory(job: Job) -> Problem | None:
    loaders = job.data.workers * job.ranks_per_node if job.task else 0
    if not loaders or not SHM.is_dir():
        return None
    stat = os.statvfs(SHM)
    free, needed = stat.f_bavail * stat.f_frsize / 2**20, loaders * WORKER_SHM_MB
    if free >= needed:
        return None
    text = (
        f"/dev/shm has {free:.0f} MiB free; {loaders} loader workers may need {needed}. Enlarge it "
        "(docker: --shm-size; Kubernetes: a Memory emptyDir on /dev/shm) or set data.workers=0"
    )
    return Problem("shm", text, True)


def _devices(job: Job) -> Problem | None:
    gpus, wanted = len(gpu_files()), job.devices_per_node
    if job.device != "cuda" or gpus >= wanted:
        return None
    text = (
        f"devices_per_node={wanted} with device=cuda, but this node has {gpus} GPUs. Ask for fewer, or set device=cpu"
    )
    return Problem("config", text, True)


def _locked_memory() -> Problem | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not has_infiniband() or soft == resource.RLIM_INFINITY or soft >= 2**30:
        return None
    text = (
        f"InfiniBand is here, but memlock is limited to {soft >> 10} KiB: RDMA registration will fail. "
        "Use ulimit -l unlimited (docker: --ulimit memlock=-1)"
    )
    return Problem("interface", text, False)


def _processors(job: Job, wiring: Wiring) -> Problem | None:
    ranks = job.ranks_per_node
    if wiring.cpus >= ranks:
        return None
    return Problem(
        "config", f"{ranks} ranks share {wiring.cpus} CPUs. On Slurm pass --cpus-per-task to srun too", False
    )


def network_settings(wiring: Wiring) -> dict[str, tuple[str, str]]:
    """Variables that the network needs, each with value and reason; usually none."""
    if wiring.nodes == 1:
        return {"GLOO_SOCKET_IFNAME": ("lo", "one node: no need for the host's name to resolve")}
    if wiring.platform == "local":
        reason = "simulated nodes live on this machine's loopback"
        return {"GLOO_SOCKET_IFNAME": ("lo", reason), "NCCL_SOCKET_IFNAME": ("=lo", f"{reason}, which NCCL skips")}
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = ""
    if wiring.interface and wiring.interface != "lo" and (not own or own.startswith("127.")):
        reason = f"this host's own name resolves to {own or 'nothing'}; {wiring.interface} routes to the master"
        return {"GLOO_SOCKET_IFNAME": (wiring.interface, reason)}
    return {}
