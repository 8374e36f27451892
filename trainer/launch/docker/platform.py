"""The docker platform: one container per node on this machine, under the same supervisor as local processes."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config.job import Job
from trainer.errors import WRONG_JOB
from trainer.launch.docker.engine import check_engine, docker, refusal
from trainer.launch.docker.nodes import DockerNodes
from trainer.launch.docker.site import DockerSite, load_docker_site
from trainer.launch.local.gpu_lease import Lease
from trainer.launch.local.platform import Supervised
from trainer.launch.platform import JobStatus, Phase, Plan
from trainer.launch.snapshot import check_files, take_snapshot
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder
from trainer.run.log_tail import last_lines
from trainer.wiring.devices import visible_devices, wanted_devices

NOT_STARTED = (125, 126, 127)
"""Exit codes of `docker run` when the engine does not start the container (docker run, "Exit status")."""
OF_THE_RUN = ("--rm", "--name=", "--network=", "--network-alias=")
"""Options that only make sense once the run's own network exists."""


class Docker(Supervised[DockerSite]):
    """Containers on this machine."""

    name = "docker"

    def load_site(self, path: Path | None) -> DockerSite:
        return load_docker_site(path)

    def build(self, plan: Plan[DockerSite]) -> list[str]:
        """`docker run` for each node, with the GPUs that are named or come first; only the last in the foreground."""
        nodes = DockerNodes(plan.run, plan.job, plan.site)
        visible = visible_devices()
        wanted = wanted_devices(plan.job, visible)
        lease = Lease(wanted if isinstance(wanted, list) else visible[:wanted])
        network = [shlex.join(["docker", "network", "create", nodes.name])] if nodes.own_network else []
        containers = " &\n".join(shlex.join(nodes.command(node, 0, lease)[0]) for node in range(plan.job.nodes))
        return [*plan.folder_lines(True), *network, containers]

    def submit(self, plan: Plan[DockerSite], request: list[str], follow: bool) -> dict[str, Any]:
        """Check the engine and start the supervisor.

        Raises JobError: no engine, no permission, no image, no GPU support, or the engine refuses the command line.
        """
        site = plan.site
        check_engine(site.reference, bool(site.registry), bool(wanted_devices(plan.job, visible_devices())))
        check_files(plan.job, plan.run, take_snapshot(Path.cwd(), plan.run), False)
        check_container(DockerNodes(plan.run, plan.job, site))
        write_json(plan.run.plan / "docker.json", asdict(site))
        return self.supervise(plan, follow)

    def nodes(self, run: RunFolder, job: Job) -> DockerNodes:
        return DockerNodes(run, job, DockerSite(**(read_json(run.plan / "docker.json") or {})))

    def status(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """By the supervisor's end; with the engine's reason when a container did not start."""
        status = super().status(run, handle)
        if status.code not in NOT_STARTED:
            return status
        logs = [last_lines(log).splitlines() for log in sorted(run.logs.glob("node-*.log"))]
        reasons = [line for lines in logs for line in lines[::-1] if line.startswith("docker:")]
        return JobStatus(Phase.FAILED, str(refusal(reasons[0])), WRONG_JOB) if reasons else status


def check_container(nodes: DockerNodes) -> None:
    """Let the engine create the first node's container and remove it: this checks options, mounts and disk space.

    Raises JobError: the engine refused.
    """
    if nodes.site.network not in ("auto", "host"):
        docker("network", "inspect", nodes.site.network)
    argv, _ = nodes.command(0, 0, Lease([]))
    created = docker("create", *(word for word in argv[2:] if not word.startswith(OF_THE_RUN)))
    docker("rm", "--force", created.split()[-1])
