"""The docker platform: one container per node on this machine, under the same supervisor as local processes."""

import math
import os
import re
import shlex
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config.job import Job
from trainer.errors import WRONG_JOB
from trainer.launch.docker.engine import check_engine, docker, refusal, run_quietly, user_options
from trainer.launch.local.gpu_lease import Lease
from trainer.launch.local.platform import Nodes, Supervised
from trainer.launch.platform import JobStatus, Phase, Plan
from trainer.launch.site import SSH_FOLDER, check_rules, fabric_environment, ssh_rules
from trainer.launch.snapshot import check_files, take_snapshot
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder
from trainer.run.log_tail import last_lines
from trainer.wiring.devices import INFINIBAND, visible_devices, wanted_devices
from trainer.wiring.variables import VISIBLE_DEVICES

SHM_BASE_MB = 256
"""For NCCL's shared-memory transport between the ranks of a container."""
SHM_BATCH_MB = 64
"""For each batch that a loader worker holds; set `shm` in the site file if yours are larger."""
STOP_MARGIN_S = 15
NOT_STARTED = (125, 126, 127)
"""Exit codes of `docker run` when the engine does not start the container (docker run, "Exit status")."""
CONFINED = ("--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only", "--pids-limit=16384")
"""What a training does not need: privileges, files of the image that it may change, processes without end."""
TEMPORARY = re.compile(r"(.*[=:])?/tmp([:,].*)?")
"""A word that puts something at /tmp."""
OF_THE_RUN = ("--rm", "--name=", "--network=", "--network-alias=")
"""Options that only make sense once the run's own network exists."""


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
    ssh: str | None = None
    ssh_config: str | None = None
    ssh_folder: str = SSH_FOLDER
    python: str | None = None

    @property
    def reference(self) -> str:
        return f"{self.registry.rstrip('/')}/{self.image}" if self.registry else self.image

    def check(self) -> None:
        """Refuse mounts and files that are not on this machine. Raises JobError: there are some."""
        check_rules([
            *ssh_rules(self),
            (self.python is not None and self.ssh is None, "python", self.python, "would be ignored without ssh",
             "Remove it: the image has its own"),
        ])  # fmt: skip
        if self.ssh:  # they are on that machine, where they are looked for
            return
        for mount in self.mounts:
            source, *rest = mount.split(":")
            well_formed = rest[:1] != [] and rest[0].startswith("/") and rest[1:] in ([], ["ro"])
            check_rules([
                (not well_formed, "mounts", mount, "is not source:target or source:target:ro",
                 "Both are absolute paths"),
                (not Path(source).exists(), "mounts", mount, f"{source} does not exist here",
                 "Make the folder first: the engine would create it as root"),
            ])  # fmt: skip
        missing = bool(self.env_file) and not Path(self.env_file).is_file()
        remedy = "Give the path of a file with NAME=value lines"
        check_rules([(missing, "env_file", self.env_file, "does not exist here", remedy)])


@dataclass
class DockerNodes(Nodes):
    """The nodes of a run as containers on a network of their own."""

    site: DockerSite

    def __post_init__(self) -> None:
        self.name = f"muster-{re.sub('[^a-zA-Z0-9_.-]', '-', self.run.name)}"  # a folder may be renamed to anything
        self.own_network = self.site.network == "auto"

    @cached_property
    def user(self) -> list[str]:
        """Who the agents are inside."""
        return user_options()

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
        self.kill()
        if self.own_network:
            run_quietly("network", "rm", self.name)

    def kill(self) -> None:
        """Remove the containers; killing `docker run` would end only the client."""
        for node in range(self.job.nodes):
            run_quietly("rm", "--force", "--volumes", f"{self.name}-{node}")

    def command(self, node: int, launch: int, lease: Lease) -> tuple[list[str], dict[str, str]]:
        """`docker run` in the foreground: it forwards signals and exits with the agent's exit code."""
        site = self.site
        variables = self.variables(node, launch, "docker") | fabric_environment(site.fabric)
        stop_s = math.ceil(self.job.agent.grace_s) + STOP_MARGIN_S
        argv = [
            "docker", "run", "--rm", f"--name={self.name}-{node}",
            f"--network={self.name if self.own_network else site.network}",
            *self.user, f"--stop-timeout={stop_s}", *CONFINED,
            _mount(str(self.run), str(self.run)), f"--workdir={self.run.code}",
        ]  # fmt: skip
        if site.network != "host":
            argv += [f"--hostname=node{node}", f"--network-alias=node{node}"]
        argv += (
            self._temporary() + self._processors(node) + self._shared_memory() + self._devices(node, lease, variables)
        )
        for mount in site.mounts:
            source, target, *mode = mount.split(":")
            argv.append(_mount(source, target, *mode))
        argv += [f"--env={name}={value}" for name, value in variables.items()]
        argv += [f"--env-file={site.env_file}"] if site.env_file else []
        return [*argv, *site.extra_args, site.reference, str(self.run.job)], {}

    def _temporary(self) -> list[str]:
        """A folder for what a container may write beside its mounts: on disk, because caches there can be large."""
        targets = [mount.split(":")[1] for mount in self.site.mounts]
        is_given = any(TEMPORARY.fullmatch(word) for word in (*targets, *self.site.extra_args))
        return [] if is_given else ["--volume=/tmp"]  # without a name it goes with its container

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


def _mount(source: str, target: str, *mode: str) -> str:
    """An option of `docker run`, whose value is a line of CSV: a comma in a path needs quotes."""
    fields = ["type=bind", f"source={source}", f"target={target}", *["readonly"] * bool(mode)]
    return "--mount=" + ",".join(f'"{field}"' if "," in field else field for field in fields)


class Docker(Supervised[DockerSite]):
    name = folder = "docker"
    asks_machine = True
    site_type = DockerSite

    def build(self, plan: Plan[DockerSite]) -> list[str]:
        """`docker run` for each node, with the GPUs that are named or come first; only the last in the foreground."""
        nodes = DockerNodes(plan.run, plan.job, plan.site)
        visible = visible_devices()
        wanted = wanted_devices(plan.job, visible)
        lease = Lease(wanted if isinstance(wanted, list) else visible[:wanted])
        network = [shlex.join(["docker", "network", "create", nodes.name])] if nodes.own_network else []
        containers = [shlex.join(nodes.command(node, 0, lease)[0]) for node in range(plan.job.nodes)]
        *others, last = containers
        return plan.shell_lines([*network, *(f"{other} &" for other in others), last], has_code=True)

    def submit(self, plan: Plan[DockerSite], request: list[str], follow: bool) -> dict[str, Any]:
        """Start the supervisor. Raises JobError: no engine, permission, image or GPU support, or a refused command."""
        site, gpus = plan.site, bool(wanted_devices(plan.job, visible_devices()))
        built = check_engine(site.reference, bool(site.registry), gpus)
        check_files(plan.job, plan.run, take_snapshot(Path.cwd(), plan.run, plan.job), False)
        check_container(DockerNodes(plan.run, plan.job, site))
        # All its containers get this build, also when the name has come to mean another one meanwhile.
        write_json(plan.run.plan / "docker.json", asdict(site) | {"image": built, "registry": ""})
        return self.supervise(plan, follow)

    def nodes(self, run: RunFolder, job: Job) -> DockerNodes:
        return DockerNodes(run, job, DockerSite(**(read_json(run.plan / "docker.json") or {})))

    def ask(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """By the supervisor's end; with the engine's reason when a container did not start."""
        status = super().ask(run, handle)
        if status.code not in NOT_STARTED:
            return status
        logs = [last_lines(log).splitlines() for log in sorted(run.logs.glob("node-*.log"))]
        reasons = [line for lines in logs for line in lines[::-1] if line.startswith(("docker:", "Error:"))]  # podman's
        return JobStatus(Phase.FAILED, str(refusal(reasons[0])), WRONG_JOB) if reasons else status


def check_container(nodes: DockerNodes) -> None:
    """Let the engine make and remove the network and a container. Raises JobError: it refused options, mounts, disk."""
    if nodes.own_network:
        nodes.prepare()
        nodes.finish()
    elif nodes.site.network != "host":
        docker("network", "inspect", nodes.site.network)
    argv, _ = nodes.command(0, 0, Lease([]))
    created = docker("create", *(word for word in argv[2:] if not word.startswith(OF_THE_RUN)))
    docker("rm", "--force", "--volumes", created.split()[-1])
