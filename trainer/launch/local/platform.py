"""The local platform: agents as processes of this machine; `nodes: 2` means two agents with their own addresses."""

import functools
import os
import shlex
import signal
import socket
import subprocess
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.job import Job
from trainer.config.user_code import check_script, import_paths
from trainer.errors import DONE, STOPPED, JobError
from trainer.launch.local.gpu_lease import Lease, try_lock
from trainer.launch.platform import JobStatus, Phase, Plan, Platform, SiteT, own_program
from trainer.launch.snapshot import check_files
from trainer.records import read_json
from trainer.run.folder import RunFolder
from trainer.signals import (
    ORPHANED,
    SUPERVISOR_SIGNALS,
    process_stat,
    send_signal,
    set_parent_death_signal,
    start_of,
)
from trainer.wiring import variables as names
from trainer.wiring.devices import visible_devices, wanted_devices


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
        return [f"127.0.0.{1 + node}" for node in range(self.job.nodes)]

    def variables(self, node: int, launch: int, platform: str) -> dict[str, str]:
        """What tells an agent its place."""
        return {
            names.PLATFORM: platform, names.JOB_ID: self.run.name, names.LAUNCH: str(launch),
            names.NODES: str(self.job.nodes), names.NODE_RANK: str(node),
            names.HOSTNAMES: ",".join(self.hostnames()), names.RUN: str(self.run),
        }  # fmt: skip

    def devices(self, node: int, lease: Lease) -> list[str]:
        each = self.job.devices_per_node
        return lease.devices[node * each : (node + 1) * each]

    def command(self, node: int, launch: int, lease: Lease) -> tuple[list[str], dict[str, str]]:
        """The command line of a node's agent, and the variables it gets."""
        variables = self.variables(node, launch, "local")
        if lease.devices:
            variables[names.CUDA_VISIBLE_DEVICES] = ",".join(self.devices(node, lease))
        return [*own_program("agent"), str(self.run.job)], variables


class Supervised(Platform[SiteT, list[str]]):
    """A platform of this machine: a supervisor process keeps the nodes of each run going.

    The request are lines for a shell. The supervisor of a submitted run makes them again for the GPUs that it leased.
    """

    ids = {"pid": "[1-9][0-9]*", "started": "[0-9]*"}  # noqa: RUF012

    def render(self, request: list[str]) -> str:
        return "\n".join(request)

    def called(self, handle: dict[str, Any]) -> str:
        return f"process {handle['pid']} on {handle.get('host', 'this machine')}"

    @abstractmethod
    def nodes(self, run: RunFolder, job: Job) -> Nodes:
        """What the supervisor of a submitted run starts."""

    def supervise(self, plan: Plan[SiteT], follow: bool) -> dict[str, Any]:
        """Start the supervisor; with `follow` it ends when this process does."""
        with lock(plan.run) as held, (plan.run.logs / "supervisor.log").open("ab") as log:
            plan.run.exit.unlink(missing_ok=True)
            process = subprocess.Popen(
                [*supervisor_argv(plan.run), f"--platform={self.name}", "--held", str(held)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=[held],
                preexec_fn=functools.partial(_prepare, os.getpid() if follow else None),
            )  # fmt: skip
        return handle_of(process.pid)

    def find(self, run: RunFolder) -> list[dict[str, Any]]:
        """What the supervisor wrote into its lock."""
        handle = read_json(run.lock)
        return [] if handle is None else [handle]

    def ask(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """By `exit.json`, else by whether the supervisor lives."""
        alive = is_alive(handle)  # first: it may write exit.json and end between the two checks
        ended = read_json(run.exit)
        if ended is not None and not isinstance(ended.get("code"), int):  # not of ours
            ended = None
        if ended is None and alive:
            return JobStatus(Phase.RUNNING)
        host = handle.get("host", socket.gethostname())
        if ended is None and host != socket.gethostname() and (is_free := _is_free(run)) is not True:
            phase = Phase.UNKNOWN if is_free is None else Phase.RUNNING
            return JobStatus(phase, f"its supervisor is on {host}, where `muster status` and `cancel` reach it")
        if ended is None:
            return JobStatus(Phase.LOST, "its supervisor is gone: it was killed, or the machine restarted")
        stopped = Phase.CANCELLED if handle.get("cancelled") else Phase.STOPPED
        code = int(ended["code"])
        return JobStatus({DONE: Phase.DONE, STOPPED: stopped}.get(code, Phase.FAILED), code=code)

    def cancel(self, run: RunFolder, handle: dict[str, Any]) -> None:
        self._signal(run, handle, signal.SIGTERM)

    def preempt(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Make the ranks save and stop; the supervisor starts them again."""
        self._signal(run, handle, signal.SIGUSR2)

    def _signal(self, run: RunFolder, handle: dict[str, Any], number: signal.Signals) -> None:
        if not is_alive(handle) or not send_signal(int(handle["pid"]), handle["started"], number):
            now = self.ask(run, handle)
            raise JobError("RUN", str(run), f"is not running here: it is {now.phase}", now.reason or "See its logs")


def handle_of(supervisor: int) -> dict[str, Any]:
    """What names the run of a supervisor, by its process id."""
    return {"pid": supervisor, "started": start_of(supervisor), "host": socket.gethostname()}


def supervisor_argv(run: RunFolder) -> list[str]:
    return [*own_program("supervisor"), str(run)]


def _prepare(follower: int | None) -> None:
    """Before the supervisor's program starts: hold signals until it can handle them, and bind it to its follower."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SUPERVISOR_SIGNALS)
    if follower is not None:
        set_parent_death_signal(follower, ORPHANED)


class Local(Supervised[None]):
    name = "local"

    def load_site(self, path: Path | None) -> None:
        """There is none. Raises JobError: one was given."""
        if path is not None:
            raise JobError("--site", str(path), "the local platform has no site file", "Remove it")

    def build(self, plan: Plan[None]) -> list[str]:
        return plan.shell_lines([shlex.join(supervisor_argv(plan.run))], has_code=False)

    def submit(self, plan: Plan[None], request: list[str], follow: bool) -> dict[str, Any]:
        wanted_devices(plan.job, visible_devices())
        source = read_json(plan.run.source) or {}
        folder = Path(source.get("working_directory", os.getcwd()))
        check_files(plan.job, plan.run, folder, True)
        if plan.job.script:
            check_script(plan.job.script, folder, import_paths(plan.run.job, plan.job.python_path))
        return self.supervise(plan, follow)

    def nodes(self, run: RunFolder, job: Job) -> Nodes:
        return Nodes(run, job)


@contextmanager
def lock(run: RunFolder) -> Iterator[int]:
    """Open and lock a file that supervisor and agents then hold. Raises JobError: some of this run still hold it."""
    handle = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if try_lock(handle) is False:
            raise JobError("RUN", str(run), "is running, or still saving", "Wait for its end, or cancel it")
        yield handle
    finally:
        os.close(handle)


def _is_free(run: RunFolder) -> bool | None:
    """Whether no supervisor holds the run, on whatever machine; None where nobody can tell."""
    with suppress(OSError), run.lock.open("r+b") as file:
        return try_lock(file.fileno())
    return None


def is_alive(handle: dict[str, Any]) -> bool:
    """Whether the supervisor that a handle names lives, on this machine."""
    if "pid" not in handle or handle.get("host", socket.gethostname()) != socket.gethostname():
        return False
    state = process_stat(int(handle["pid"]))[:1]
    return state not in ([], ["Z"]) and start_of(int(handle["pid"])) == handle["started"]
