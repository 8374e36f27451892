"""The docker platform: one container per node on this machine, under the same supervisor as local processes."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.job import Job
from trainer.errors import WRONG_JOB, JobError
from trainer.launch.docker.engine import check_engine, docker, refusal, run_quietly
from trainer.launch.fabric import fabric_environment
from trainer.launch.local.gpu_lease import Lease
from trainer.launch.local.nodes import Nodes
from trainer.launch.local.platform import Local
from trainer.launch.platform import Plan, State
from trainer.launch.runs import check_files, make_run_by_hand
from trainer.launch.site import read_site
from trainer.launch.snapshot import take_snapshot
from trainer.records import read_json, write_json
from trainer.run.log_tail import last_lines
from trainer.wiring.devices import INFINIBAND, visible_devices, wanted_devices

SHM_BASE_MB = 256
"""NCCL's shared-memory transport between the ranks of a container."""
SHM_BATCH_MB = 64
"""A batch in flight in a loader worker; larger ones want `shm` in the site file."""
STOP_MARGIN_S = 15
NOT_STARTED = (125, 126, 127)
"""What `docker run` itself answers when the engine does not start the container (docker run, "Exit status")."""


@dataclass
class DockerSite:
    """`docker/site.yaml`: see there for what each key means."""

    image: str = "muster"
    registry: str = ""
    mounts: list[str] = field(default_factory=list)
    shm: str = "auto"
    network: str = "auto"
    fabric: str = "none"
    env_file: str = ""
    extra_args: list[str] = field(default_factory=list)

    @property
    def reference(self) -> str:
        """The image's full name."""
        return f"{self.registry.rstrip('/')}/{self.image}" if self.registry else self.image


class DockerNodes(Nodes):
    """The nodes of a run as containers on a network of their own."""

    def __init__(self, run: Path, job: Job, site: DockerSite) -> None:
        """Remember the run and the site."""
        super().__init__(run, job)
        self.site = site
        self.name = f"muster-{run.name}"
        self.own_network = site.network == "auto"

    def hostnames(self) -> list[str]:
        """Short names, which the run's network resolves; on the machine's own network its loopback."""
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
        """End the containers: a signal to `docker run` reaches only the client."""
        for node in range(self.job.nodes):
            run_quietly(["docker", "rm", "--force", f"{self.name}-{node}"])

    def command(self, node: int, launch: int, lease: Lease) -> tuple[list[str], dict[str, str]]:
        """`docker run` in the foreground: it hands signals on and answers with the agent's exit code."""
        variables = self.variables(node, launch, "docker") | fabric_environment(self.site.fabric)
        stop_s = math.ceil(self.job.agent.grace_s) + STOP_MARGIN_S
        words = [
            "docker", "run", "--rm", f"--name={self.name}-{node}", f"--network={self.network()}",
            f"--user={os.getuid()}:{os.getgid()}", f"--stop-timeout={stop_s}",
            f"--mount=type=bind,source={self.run},target={self.run}", f"--workdir={self.run / 'code'}",
        ]  # fmt: skip
        if self.site.network != "host":
            words += [f"--hostname=node{node}", f"--network-alias=node{node}"]
        words += self._processors(node)
        words += self._shared_memory() + self._devices(node, lease, variables)
        for mount in self.site.mounts:
            source, _, rest = mount.partition(":")
            target, _, mode = rest.partition(":")
            words.append(f"--mount=type=bind,source={source},target={target}" + (",readonly" if mode == "ro" else ""))
        words += [f"--env={name}={value}" for name, value in variables.items()]
        if self.site.env_file:
            words.append(f"--env-file={self.site.env_file}")
        return [*words, *self.site.extra_args, self.site.reference, str(self.run / "job.yaml")], {}

    def _processors(self, node: int) -> list[str]:
        """A share of the cores: each agent would otherwise start a thread for every one of them."""
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
        # Inside, devices are numbered from 0 in the machine's order: the primary keeps its place by its new number.
        order = sorted(devices, key=lambda name: (len(name), name))
        variables["MUSTER_VISIBLE_DEVICES"] = ",".join(str(order.index(name)) for name in devices)
        words = [f'--gpus="device={",".join(devices)}"']
        if INFINIBAND.is_dir():
            words += ["--ulimit=memlock=-1", "--ulimit=stack=67108864", "--device=/dev/infiniband"]
        return words


class Docker(Local):
    """Containers on this machine."""

    name = "docker"

    def load_site(self, path: Path | None) -> dict[str, Any]:
        """Read and check `docker/site.yaml` or the given file."""
        site = read_site(path, "docker", DockerSite)
        for mount in site.mounts:
            parts = mount.split(":")
            if len(parts) not in (2, 3) or parts[2:] not in ([], ["ro"]) or not parts[1].startswith("/"):
                raise JobError("mounts", mount, "is not source:target or source:target:ro", "Both are absolute paths")
            if not Path(parts[0]).exists():
                raise JobError("mounts", mount, f"{parts[0]} does not exist here", "The engine would make it, as root")
        if site.env_file and not Path(site.env_file).is_file():
            raise JobError("env_file", site.env_file, "does not exist here", "Name a file of NAME=value lines")
        fabric_environment(site.fabric)
        return asdict(site)

    def render(self, plan: Plan) -> str:
        """The command lines, one container a node, as they can be typed."""
        nodes = DockerNodes(plan.run, plan.job, DockerSite(**plan.site))
        visible = visible_devices()
        wanted = wanted_devices(plan.job, visible)
        devices = wanted if isinstance(wanted, list) else visible[:wanted]
        lines = make_run_by_hand(plan.run, plan.config, True)
        lines += [f"docker network create {nodes.name}"] if nodes.own_network else []
        for node in range(plan.job.nodes):
            words, _ = nodes.command(node, 0, Lease(devices))
            lines.append(shlex.join(words) + (" &" if node < plan.job.nodes - 1 else ""))
        return "\n".join(lines)

    def submit(self, plan: Plan, follow: bool) -> dict[str, Any]:
        """Check the engine and start the supervisor.

        Raises:
            JobError: no engine, no permission, no image, no GPU support, or the engine refuses the command line.
        """
        site = DockerSite(**plan.site)
        wanted = wanted_devices(plan.job, visible_devices())
        check_engine(site.reference, bool(site.registry), bool(wanted))
        check_files(plan.job, plan.run, take_snapshot(Path.cwd(), plan.run), False)
        check_command(DockerNodes(plan.run, plan.job, site))
        write_json(plan.run / "plan" / "docker.json", plan.site)
        return self._supervise(plan, follow)

    def nodes(self, run: Path, job: Job) -> Nodes:
        """Containers as the site file says that the run was submitted with."""
        return DockerNodes(run, job, DockerSite(**(read_json(run / "plan" / "docker.json") or {})))

    def state(self, run: Path, handle: dict[str, Any]) -> State:
        """By the supervisor's end; of a container that did not start, with the engine's reason."""
        state = super().state(run, handle)
        if state.code not in NOT_STARTED:
            return state
        logs = [last_lines(log).splitlines() for log in sorted((run / "logs").glob("node-*.log"))]
        said = [line for lines in logs for line in lines[::-1] if line.startswith("docker:")]
        return State("failed", str(refusal(["run"], said[0])), WRONG_JOB) if said else state


def check_command(nodes: DockerNodes) -> None:
    """Let the engine make a container of the first node, and remove it: it then has checked words, mounts and disk.

    Raises:
        JobError: it refused.
    """
    if nodes.site.network not in ("auto", "host"):
        docker(["network", "inspect", nodes.site.network])
    words, _ = nodes.command(0, 0, Lease([]))
    ours = ("--rm", "--name=", "--network=", "--network-alias=")  # of the run, whose network is not made yet
    made = docker(["create", *(word for word in words[2:] if not word.startswith(ours))])
    docker(["rm", "--force", made.split()[-1]])
