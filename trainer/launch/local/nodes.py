"""The nodes of a local run, which are processes of this machine: their names, devices, and how an agent is started.

Which node is started when, and what follows from its end, is decided in `trainer.launch.local.supervisor`.
"""

import sys
from dataclasses import dataclass

from trainer.config.job import Job
from trainer.launch.local.gpu_lease import Lease
from trainer.run.folder import RunFolder
from trainer.wiring import variables as names


@dataclass
class Nodes:
    """Nodes as processes, each with an address of its own on the loopback."""

    run: RunFolder
    job: Job

    def prepare(self) -> None:
        """Make what the nodes share."""

    def finish(self) -> None:
        """Remove what `prepare` made."""

    def kill(self) -> None:
        """End what a signal to the agents' processes would not end."""

    def hostnames(self) -> list[str]:
        """The name of each node."""
        return [f"127.0.0.{1 + node}" for node in range(self.job.nodes)]

    def variables(self, node: int, launch: int, platform: str) -> dict[str, str]:
        """What tells an agent its place."""
        return {
            names.PLATFORM: platform, names.JOB_ID: self.run.name, names.LAUNCH: str(launch),
            names.NODES: str(self.job.nodes), names.NODE_RANK: str(node),
            names.HOSTNAMES: ",".join(self.hostnames()), names.RUN: str(self.run),
        }  # fmt: skip

    def devices(self, node: int, lease: Lease) -> list[str]:
        """The leased GPUs of a node."""
        each = self.job.devices_per_node
        return lease.devices[node * each : (node + 1) * each]

    def command(self, node: int, launch: int, lease: Lease) -> tuple[list[str], dict[str, str]]:
        """The command line of a node's agent, and the variables it gets."""
        variables = self.variables(node, launch, "local")
        if lease.devices:
            variables[names.CUDA_VISIBLE_DEVICES] = ",".join(self.devices(node, lease))
        return [sys.executable, "-m", "trainer", str(self.run.job)], variables
