"""What a process may use of this machine: processors (its affinity, and a container's limit) and shared memory."""

import contextlib
import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
WORKER_SHM_MB = 64
"""What one loader worker may need of /dev/shm: a few batches in flight; docker's default for a whole container."""


def usable_processors(root: Path = CGROUPS) -> tuple[int, str]:
    """The number, and where it comes from.

    A container's limit (`docker run --cpus`, a pod's limits.cpu) leaves the affinity at all processors of its host:
    as many threads as those would only be throttled.
    """
    affinity = len(os.sched_getaffinity(0))
    limit = cpu_limit(root)
    if limit is not None and limit < affinity:
        return max(1, math.ceil(limit)), f"CPU limit of the container: {limit:g} of {affinity}"
    return affinity, "CPU affinity of this process"


def cpu_limit(root: Path = CGROUPS) -> float | None:
    """Processors that the cgroup may use; None without a limit (cpu.max of cgroup v2, cfs_quota of v1)."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        return quota_us / int((root / "cpu" / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    return None
