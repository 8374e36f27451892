"""The docker platform: one container per node on this machine, under the same supervisor as local processes."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import Job
from trainer.errors import JobError
from trainer.launch.fabric import fabric_environment
from trainer.launch.lease import Lease, visible_devices, wanted_devices
from trainer.launch.local import Local
from trainer.launch.platform import Plan
from trainer.launch.site import read_site
from trainer.launch.snapshot import take_snapshot
from trainer.launch.supervisor import Nodes
from trainer.record import write_json

SHM_BASE_MB = 256
"""NCCL's shared-memory transport between the ranks of a container."""
SHM_BATCH_MB = 64
"""A batch in flight in a loader worker; larger ones want `shm` in the site file."""
STOP_MARGIN_S = 15


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
            _quiet(["docker", "rm", "--force", f"{self.name}-{node}"])
        if self.own_network:
            _quiet(["docker", "network", "rm", self.name])
            docker(["network", "create", self.name])

    def finish(self) -> None:
        """Remove containers and network."""
        self.kill()
        if self.own_network:
            _quiet(["docker", "network", "rm", self.name])

    def kill(self) -> None:
        """End the containers: a signal to `docker run` reaches only the client."""
        for node in range(self.job.nodes):
            _quiet(["docker", "rm", "--force", f"{self.name}-{node}"])

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
        if Path("/sys/class/infiniband").is_dir():
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
        lines = [f"docker network create {nodes.name}"] if nodes.own_network else []
        for node in range(plan.job.nodes):
            words, _ = nodes.command(node, 0, Lease(devices))
            lines.append(shlex.join(words) + (" &" if node < plan.job.nodes - 1 else ""))
        return "\n".join(lines)

    def submit(self, plan: Plan, follow: bool) -> dict[str, Any]:
        """Check the engine and start the supervisor.

        Raises:
            JobError: no engine, no permission, no image, no GPU support.
        """
        site = DockerSite(**plan.site)
        wanted = wanted_devices(plan.job, visible_devices())
        check_engine(site, bool(wanted))
        take_snapshot(Path.cwd(), plan.run)
        write_json(plan.run / "plan" / "docker.json", plan.site)
        return self._supervise(plan, [*self._command(plan.run), "--docker"], follow)


def check_engine(site: DockerSite, gpus: bool) -> None:
    """Ask the engine whether it can run this.

    Raises:
        JobError: with the remedy.
    """
    if shutil.which("docker") is None:
        raise JobError("--on", "docker", "there is no docker command here", "Install Docker, or use --on local")
    docker(["version", "--format", "{{.Server.Version}}"])
    if subprocess.run(["docker", "image", "inspect", site.reference], capture_output=True).returncode:
        remedy = (
            f"docker pull {site.reference}"
            if site.registry
            else "make docker-build, or name another in docker/site.yaml"
        )
        raise JobError("image", site.reference, "is not on this machine", remedy)
    if gpus and "nvidia" not in docker(["info", "--format", "{{json .Runtimes}} {{json .CDISpecDirs}}"]):
        raise JobError("device", "cuda", "the engine cannot give GPUs to containers",
                       "Install the NVIDIA container toolkit, or set device=cpu")  # fmt: skip


REFUSALS = (
    ("permission denied", "your user may not use the engine's socket", "Join the group docker (sudo usermod -aG docker "
     "$USER, then log in again)"),
    ("Cannot connect", "no engine answers", "Start it: sudo systemctl start docker"),
    ("no space left", "the engine's disk is full", "docker system prune, or give it more space"),
)  # fmt: skip


def docker(words: list[str]) -> str:
    """Run a docker command and return what it prints.

    Raises:
        JobError: it failed; the remedy for the usual reasons.
    """
    done = subprocess.run(["docker", *words], capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    text = " ".join(done.stderr.split())
    for pattern, problem, remedy in REFUSALS:
        if pattern.lower() in text.lower():
            raise JobError("--on", "docker", problem, remedy)
    raise JobError("docker", " ".join(words), text[:400], "Correct docker/site.yaml")


def _quiet(command: list[str]) -> None:
    with contextlib.suppress(OSError):
        subprocess.run(command, capture_output=True)
