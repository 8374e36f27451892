"""The containers of a run: one per node, with the `docker run` command line of each."""

import math
import os
from dataclasses import dataclass

from trainer.launch.docker.engine import docker, run_quietly
from trainer.launch.docker.site import DockerSite
from trainer.launch.fabric import fabric_environment
from trainer.launch.local.gpu_lease import Lease
from trainer.launch.local.nodes import Nodes
from trainer.wiring.devices import INFINIBAND
from trainer.wiring.variables import VISIBLE_DEVICES

SHM_BASE_MB = 256
"""For NCCL's shared-memory transport between the ranks of a container."""
SHM_BATCH_MB = 64
"""For each batch that a loader worker holds; set `shm` in the site file if yours are larger."""
STOP_MARGIN_S = 15


@dataclass
class DockerNodes(Nodes):
    """The nodes of a run as containers on a network of their own."""

    site: DockerSite

    def __post_init__(self) -> None:
        self.name = f"muster-{self.run.name}"
        self.own_network = self.site.network == "auto"

    def hostnames(self) -> list[str]:
        """Short names that the run's network resolves; with the machine's own network, loopback addresses."""
        if self.site.network == "host":
            return super().hostnames()
        return [f"node{node}" for node in range(self.job.nodes)]

    def prepare(self) -> None:
        """Make the network; remove what a killed supervisor left behind."""
        self.finish()
        if self.own_network:
            docker("network", "create", self.name)

    def finish(self) -> None:
        """Remove containers and network."""
        self.kill()
        if self.own_network:
            run_quietly("network", "rm", self.name)

    def kill(self) -> None:
        """Remove the containers; killing `docker run` would end only the client."""
        for node in range(self.job.nodes):
            run_quietly("rm", "--force", f"{self.name}-{node}")

    def command(self, node: int, launch: int, lease: Lease) -> tuple[list[str], dict[str, str]]:
        """`docker run` in the foreground: it forwards signals and exits with the agent's exit code."""
        site = self.site
        variables = self.variables(node, launch, "docker") | fabric_environment(site.fabric)
        stop_s = math.ceil(self.job.agent.grace_s) + STOP_MARGIN_S
        argv = [
            "docker", "run", "--rm", f"--name={self.name}-{node}",
            f"--network={self.name if self.own_network else site.network}",
            f"--user={os.getuid()}:{os.getgid()}", f"--stop-timeout={stop_s}",
            f"--mount=type=bind,source={self.run},target={self.run}", f"--workdir={self.run.code}",
        ]  # fmt: skip
        if site.network != "host":
            argv += [f"--hostname=node{node}", f"--network-alias=node{node}"]
        argv += self._processors(node) + self._shared_memory() + self._devices(node, lease, variables)
        for mount in site.mounts:
            source, target, *mode = mount.split(":")
            argv.append(f"--mount=type=bind,source={source},target={target}" + ",readonly" * bool(mode))
        argv += [f"--env={name}={value}" for name, value in variables.items()]
        argv += [f"--env-file={site.env_file}"] if site.env_file else []
        return [*argv, *site.extra_args, site.reference, str(self.run.job)], {}

    def _processors(self, node: int) -> list[str]:
        """A share of the cores; otherwise each agent would start one thread for every core of the machine."""
        share = sorted(os.sched_getaffinity(0))[node :: self.job.nodes]
        return [f"--cpuset-cpus={','.join(map(str, share))}"] if self.job.nodes > 1 and share else []

    def _shared_memory(self) -> list[str]:
        if self.site.shm == "host":
            return ["--ipc=host"]
        batches = self.job.data.workers * self.job.ranks_per_node * self.job.data.prefetch
        needed = f"{SHM_BASE_MB + batches * SHM_BATCH_MB}m"
        return [f"--shm-size={needed if self.site.shm == 'auto' else self.site.shm}"]

    def _devices(self, node: int, lease: Lease, variables: dict[str, str]) -> list[str]:
        devices = self.devices(node, lease)
        if not devices:
            return []
        # A container numbers its devices from 0 in the machine's order; the primary is named by its new number.
        order = sorted(devices, key=lambda name: (len(name), name))
        variables[VISIBLE_DEVICES] = ",".join(str(order.index(name)) for name in devices)
        fabric = ["--ulimit=memlock=-1", "--ulimit=stack=67108864", "--device=/dev/infiniband"]
        return [f'--gpus="device={",".join(devices)}"', *(fabric if INFINIBAND.is_dir() else [])]
