"""The containers of a run: one per node, with the `docker run` command line of each."""

from __future__ import annotations

import math
import os

from trainer.config.job import Job
from trainer.launch.docker.engine import docker, run_quietly
from trainer.launch.docker.site import DockerSite
from trainer.launch.fabric import fabric_environment
from trainer.launch.local.gpu_lease import Lease
from trainer.launch.local.nodes import Nodes
from trainer.run.folder import RunFolder
from trainer.wiring.devices import INFINIBAND
from trainer.wiring.variables import VISIBLE_DEVICES

SHM_BASE_MB = 256
"""For NCCL's shared-memory transport between the ranks of a container."""
SHM_BATCH_MB = 64
"""For each batch that a loader worker holds; set `shm` in the site file if yours are larger."""
STOP_MARGIN_S = 15


class DockerNodes(Nodes):
    """The nodes of a run as containers on a network of their own."""

    def __init__(self, run: RunFolder, job: Job, site: DockerSite) -> None:
        """Remember the run and the site."""
        super().__init__(run, job)
        self.site = site
        self.name = f"muster-{run.name}"
        self.own_network = site.network == "auto"

    def hostnames(self) -> list[str]:
        """Short names that the run's network resolves; with the machine's own network, loopback addresses."""
        if self.site.network == "host":
            return super().hostnames()
        return [f"node{node}" for node in range(self.job.nodes)]

    def network(self) -> str:
        """The network of the containers."""
        return self.name if self.own_network else self.site.network

    def prepare(self) -> None:
        """Make the network; remove containers that a killed supervisor left behind."""
        for node in range(self.job.nodes):
            run_quietly(["docker", "rm", "--force", f"{self.name}-{node}"])
        if self.own_network:
            run_quietly(["docker", "network", "rm", self.name])
            docker(["network", "create", self.name])

    def finish(self) -> None:
        """Remove containers and network."""
        self.kill()
        if self.own_network:
            run_quietly(["docker", "network", "rm", self.name])

    def kill(self) -> None:
        """Remove the containers; killing `docker run` would end only the client."""
        for node in range(self.job.nodes):
            run_quietly(["docker", "rm", "--force", f"{self.name}-{node}"])

    def command(self, node: int, launch: int, lease: Lease) -> tuple[list[str], dict[str, str]]:
        """`docker run` in the foreground: it forwards signals and exits with the agent's exit code."""
        variables = self.variables(node, launch, "docker") | fabric_environment(self.site.fabric)
        stop_s = math.ceil(self.job.agent.grace_s) + STOP_MARGIN_S
        argv = [
            "docker", "run", "--rm", f"--name={self.name}-{node}", f"--network={self.network()}",
            f"--user={os.getuid()}:{os.getgid()}", f"--stop-timeout={stop_s}",
            f"--mount=type=bind,source={self.run},target={self.run}", f"--workdir={self.run.code}",
        ]  # fmt: skip
        if self.site.network != "host":
            argv += [f"--hostname=node{node}", f"--network-alias=node{node}"]
        argv += self._processors(node)
        argv += self._shared_memory() + self._devices(node, lease, variables)
        for mount in self.site.mounts:
            source, _, rest = mount.partition(":")
            target, _, mode = rest.partition(":")
            argv.append(f"--mount=type=bind,source={source},target={target}" + (",readonly" if mode == "ro" else ""))
        argv += [f"--env={name}={value}" for name, value in variables.items()]
        if self.site.env_file:
            argv.append(f"--env-file={self.site.env_file}")
        return [*argv, *self.site.extra_args, self.site.reference, str(self.run.job)], {}

    def _processors(self, node: int) -> list[str]:
        """A share of the cores; otherwise each agent would start one thread for every core of the machine."""
        cores = sorted(os.sched_getaffinity(0))
        share = cores[node :: self.job.nodes]
        return [f"--cpuset-cpus={','.join(map(str, share))}"] if self.job.nodes > 1 and share else []

    def _shared_memory(self) -> list[str]:
        if self.site.shm == "host":
            return ["--ipc=host"]
        if self.site.shm != "auto":
            return [f"--shm-size={self.site.shm}"]
        workers = self.job.data.workers * self.job.ranks_per_node
        return [f"--shm-size={SHM_BASE_MB + workers * self.job.data.prefetch * SHM_BATCH_MB}m"]

    def _devices(self, node: int, lease: Lease, variables: dict[str, str]) -> list[str]:
        devices = self.devices(node, lease)
        if not devices:
            return []
        # A container numbers its devices from 0 in the machine's order; the primary is named by its new number.
        order = sorted(devices, key=lambda name: (len(name), name))
        variables[VISIBLE_DEVICES] = ",".join(str(order.index(name)) for name in devices)
        argv = [f'--gpus="device={",".join(devices)}"']
        if INFINIBAND.is_dir():
            argv += ["--ulimit=memlock=-1", "--ulimit=stack=67108864", "--device=/dev/infiniband"]
        return argv
