"""Our submitit JobEnvironment: node facts on the platforms that submitit does not know.

Registered under the entry point group `submitit`, so `submitit.JobEnvironment()` finds it in any process of a
job on `local`, `docker` or `kubernetes`. Slurm uses submitit's own.
"""

import os
from collections.abc import Sequence
from typing import Any, ClassVar

from submitit.core.job_environment import JobEnvironment

from trainer.wiring import variables as names


class MusterJobEnvironment(JobEnvironment):
    """One agent, and so one submitit task, per node, described by MUSTER_* variables."""

    _env: ClassVar[dict[str, str]] = {
        "job_id": names.JOB_ID, "num_tasks": names.NODES, "num_nodes": names.NODES, "node": names.NODE_RANK,
        "global_rank": names.NODE_RANK, "local_rank": names.LOCAL_TASK,
    }  # fmt: skip

    def activated(self) -> bool:
        """Whether this process belongs to a job that Muster started."""
        return bool(os.environ.get(names.PLATFORM)) or super().activated()

    @property
    def hostnames(self) -> Sequence[str]:
        """All nodes, in order of their rank; submitit's default would name every node its own master."""
        return os.environ[names.HOSTNAMES].split(",")

    def _handle_signals(self, paths: Any, submission: Any) -> None:
        """Leave signals to the agent: submitit's default swallows SIGTERM and saves inside the handler."""
