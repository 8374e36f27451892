"""Which devices a node and a rank use. No other module decides that.

The agent and the submitting side must not ask the CUDA driver: it would break the ranks that are forked later. They
count device files. A rank asks torch, in `use_cuda`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from trainer.errors import JobError
from trainer.wiring import variables as names
from trainer.wiring.rank import is_rank

INFINIBAND = Path("/sys/class/infiniband")


class DeviceWishes(Protocol):
    """What a job says about devices: these fields of `trainer.config.job.Job`."""

    parallel: str
    device: str
    devices: list[int] | None
    devices_per_node: int
    nodes: int


def gpu_files() -> list[str]:
    """The NVIDIA GPUs of this machine or container, by their device files."""
    if not Path("/proc/driver/nvidia/version").exists():
        return []
    return sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))


def has_infiniband() -> bool:
    """Whether this machine has an InfiniBand or RoCE device."""
    return INFINIBAND.is_dir() and any(INFINIBAND.iterdir())


def visible_devices() -> list[str]:
    """GPUs that this process may use, counted as CUDA does: a container that was given `nvidia3` alone calls it 0."""
    mask = os.environ.get(names.CUDA_VISIBLE_DEVICES)
    files = gpu_files()
    return list(map(str, range(len(files)))) if mask is None or not files else _entries(mask)


def wanted_devices(job: DeviceWishes, visible: list[str]) -> list[str] | int:
    """Which of the `visible` GPUs a job needs here: names, a number of any, 0 for the CPU. Raises JobError: too few."""
    if job.device == "cpu":
        return 0
    if job.devices is not None and visible:
        if not set(map(str, job.devices)) <= set(visible):
            problem = f"this machine has the devices {', '.join(visible)}"
            raise JobError("devices", job.devices, problem, "Choose among those")
        return list(map(str, job.devices))
    count = job.nodes * job.devices_per_node
    if count <= len(visible):
        return count
    if job.device == "cuda":
        problem = f"{count} GPUs are needed on this machine, which shows {len(visible)}"
        raise JobError("devices_per_node", job.devices_per_node, problem, "Ask for fewer, or set device=cpu")
    return 0


def choose_mask(environ: Mapping[str, str], devices: list[int] | None) -> tuple[str | None, str]:
    """The GPU mask for the ranks of a node, or None, and its source. Raises JobError: `devices` are outside of it."""
    leased = environ.get(names.VISIBLE_DEVICES)
    if leased:
        return leased, f"{names.VISIBLE_DEVICES}: the lease, as this container numbers its devices"
    mask = environ.get(names.CUDA_VISIBLE_DEVICES)
    if devices is None:
        return mask, "no mask is set" if mask is None else "CUDA_VISIBLE_DEVICES of the environment"
    chosen = ",".join(map(str, devices))
    if mask is None:
        return chosen, "devices in the job file"
    if not set(map(str, devices)) <= set(_entries(mask)):
        problem = f"contradicts CUDA_VISIBLE_DEVICES={mask}, which the scheduler or you set"
        raise JobError("devices", devices, problem, "Choose among those, or unset CUDA_VISIBLE_DEVICES")
    return chosen, "devices in the job file, inside CUDA_VISIBLE_DEVICES"


def use_cuda(job: DeviceWishes) -> bool:
    """Whether this rank computes on GPUs. For ranks only: it asks the driver. Raises JobError: too few GPUs."""
    import torch

    if job.device == "cpu":
        return False
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    by_an_agent = os.environ.get(names.ATTEMPT) or os.environ.get(names.RUN_ID)  # whose ranks share what they see
    one_each = is_rank() and not by_an_agent and os.environ.get(names.SLURM_GPUS_PER_TASK)  # srun --gpus-per-task=1
    if count >= job.devices_per_node or (count == 1 and one_each):
        return True
    if job.device == "cuda" or (job.devices is not None and count):
        key = "devices_per_node" if job.devices is None else "devices"
        remedy = "Ask for fewer, or set device=cpu. nvidia-smi and CUDA_VISIBLE_DEVICES say what is visible"
        raise JobError(key, getattr(job, key), f"this node has {count} usable GPUs", remedy)
    return False


def rank_gpus(job: DeviceWishes, local_rank: int) -> list[int]:
    """The GPUs that a rank computes on, as CUDA numbers those that it sees: all of its node under dp, else one."""
    import torch

    if job.parallel == "dp":
        return list(range(job.devices_per_node))
    return [local_rank if torch.cuda.device_count() > 1 else 0]


def _entries(mask: str) -> list[str]:
    return [entry.strip() for entry in mask.split(",") if entry.strip()]
