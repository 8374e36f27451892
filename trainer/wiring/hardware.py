"""What a process may use of this machine: processors and memory (within cgroups' limits), shared memory, files."""

import contextlib
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMORY = Path("/proc/meminfo")
OPEN_FILES = 1 << 16
"""More than any job needs; programs that look at each number up to the limit are still quick."""
WORKER_SHM_MB = 64
"""What one loader worker may need of /dev/shm: a few batches in flight; docker's default for a whole container."""


def usable_processors(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> tuple[int, str]:
    """The number, and where it comes from.

    A limit (`docker run --cpus`, a pod's limits.cpu, systemd's CPUQuota) leaves the affinity at all processors of its
    host: as many threads as those would only be throttled.
    """
    affinity = len(os.sched_getaffinity(0))
    limit = cpu_limit(root, own)
    if limit is not None and limit < affinity:
        return max(1, math.ceil(limit)), f"CPU limit of this cgroup: {limit:g} of {affinity}"
    return affinity, "CPU affinity of this process"


def cpu_limit(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> float | None:
    """Processors that this process may use by its cgroup and those around it; None without a limit."""
    limits = [limit for folder in cgroup_folders("cpu", root, own) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def cgroup_folders(controller: str, root: Path = CGROUPS, own: Path = OWN_CGROUP) -> Iterator[Path]:
    """The folders of this process's cgroup and of those around it, its own first: of v2, and of v1's `controller`.

    Where `own`, a container's view of its host, names none that is here, those of the roots are left.
    """
    lines = []
    with contextlib.suppress(OSError):
        lines = own.read_text().splitlines()
    for line in [*lines, "0::/", f"1:{controller}:/"]:
        _, controllers, path = line.split(":", 2)
        tops = (root, root / "unified") if not controllers else (root / controller, root / controllers)
        if not controllers or controller in controllers.split(","):
            for top in tops:
                folder = top / path.strip("/")
                yield from [folder, *(outer for outer in folder.parents if outer.is_relative_to(top))]


def _limit(folder: Path) -> float | None:
    """The limit of one cgroup: cpu.max of v2, cpu.cfs_quota_us of v1."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        return quota_us / int((folder / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    return None


def free_memory(root: Path = CGROUPS, own: Path = OWN_CGROUP, machine: Path = MEMORY) -> int:
    """Bytes that this process may still use, by its cgroup, those around it, and the machine."""
    limits = [limit for folder in cgroup_folders("memory", root, own) if (limit := _unused(folder)) is not None]
    lines = (line.split() for line in machine.read_text().splitlines())
    limits += [int(number) * 1024 for name, number, *_ in lines if name == "MemAvailable:"]
    return max(0, min(limits, default=sys.maxsize))


def _unused(folder: Path) -> int | None:
    """What is left of the limit of one cgroup of v2 or v1; files that are only cached go when memory is needed."""
    for limit, used, file, shared in (
        ("memory.max", "memory.current", "file", "shmem"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(facts[file]) - int(facts.get(shared, 0))
            return int((folder / limit).read_text()) - int((folder / used).read_text()) + cached
    return None


def raise_open_files() -> None:
    """Let this process, and those that it starts, open as many files as they may, within reason.

    Batches of loader workers and connections of other nodes are open files; a shell's usual limit is 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
