"""`python -m trainer.launch.local.supervisor RUN`: keeps the agents of a local job running, as kubelet keeps pods.

It holds the lease of the GPUs, starts an agent that was killed again, and starts all again after a preemption.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from trainer.agent.ahead import Loaded
from trainer.config.job import Job
from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB, JobError
from trainer.launch.early import ORPHANED, Waiting
from trainer.launch.local.gpu_lease import Lease, try_lease
from trainer.records import read_json, record_event, write_json
from trainer.run.folder import steps_committed
from trainer.signals import SIGNALS, end_with
from trainer.wiring.devices import visible_devices, wanted_devices
from trainer.wiring.variables import without_ranks

POLL_S = 0.03
LINGER_S = 60.0
"""Once one agent has ended, for the others to end too: what `srun --wait` is on Slurm."""
KILLED_CONTAINER = 137
"""What `docker run` answers for a container that was killed, for memory for example."""


class Nodes:
    """The nodes of a local run: processes with addresses of their own on the loopback."""

    def __init__(self, run: Path, job: Job) -> None:
        """Remember the run."""
        self.run, self.job = run, job

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
            "MUSTER_PLATFORM": platform, "MUSTER_JOB_ID": self.run.name, "MUSTER_LAUNCH": str(launch),
            "MUSTER_NODES": str(self.job.nodes), "MUSTER_NODE_RANK": str(node),
            "MUSTER_HOSTNAMES": ",".join(self.hostnames()), "MUSTER_RUN": str(self.run),
        }  # fmt: skip

    def devices(self, node: int, lease: Lease) -> list[str]:
        """The leased GPUs of a node."""
        each = self.job.devices_per_node
        return lease.devices[node * each : (node + 1) * each]

    def command(self, node: int, launch: int, lease: Lease) -> tuple[list[str], dict[str, str]]:
        """The command line of a node's agent, and the variables it gets."""
        variables = self.variables(node, launch, "local")
        if lease.devices:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices(node, lease))
        return [sys.executable, "-m", "trainer", str(self.run / "job.yaml")], variables


class Supervisor:
    """Starts, watches and ends the agents of one run."""

    def __init__(
        self, run: Path, job: Job, nodes: Nodes, kept: Sequence[int] = (), first: Waiting | None = None
    ) -> None:
        """`nodes`: what an agent's process is here; for the others see `serve`."""
        self.run, self.job, self.nodes = run, job, nodes
        source = read_json(run / "plan" / "source.json")
        self.folder = source["working_directory"] if source and os.path.isdir(source["working_directory"]) else None
        self.kept, self.first = kept, first
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        self.codes: dict[int, int] = {}
        self.launch = 0
        self.stop_requests = self.told = 0
        self.preempted = False
        self.stopping = False
        """Whether the agents of this launch are to end, whoever asked for it."""
        self.deadline = math.inf
        """When those that are still there are killed."""
        self.used, self.progress = 0, -1
        self.lease = Lease([])

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal: USR2 preempts, TERM and INT end for good, a second time at once, HUP as they do once."""
        if number == signal.SIGUSR2:
            self.preempted = True
        elif number == ORPHANED:
            self.stop_requests = max(1, self.stop_requests)
        else:
            self.stop_requests += 1

    def main(self) -> int:
        """Run all agents to the end; return the job's exit code."""
        heard = (*SIGNALS, ORPHANED)
        for number in heard:
            signal.signal(number, self.handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
        if not self.take_lease():
            return STOPPED
        self.start_all()
        while True:
            self.pass_on()
            for node, agent in list(self.agents.items()):
                code = agent.poll()
                if code is not None:
                    self.ended(node, code)
            if not self.agents:
                code = worst(list(self.codes.values()))
                if self.told > 1:
                    return STOPPED
                if code != STOPPED or self.told:
                    return code
                self.launch += 1
                record_event(self.run, "requeued", launch=self.launch)
                self.start_all()
            time.sleep(POLL_S)

    def pass_on(self) -> None:
        """Hand requests on to the agents: once to save and stop, then to end at once."""
        if self.stop_requests > self.told:
            self.told = self.stop_requests
            self.stop(signal.SIGTERM)
        elif self.preempted:
            self.stop(signal.SIGUSR2)
        self.preempted = False
        if self.told > 1 or time.monotonic() > self.deadline:
            self.nodes.kill()
            self.send(signal.SIGKILL)

    def stop(self, number: signal.Signals) -> None:
        """Tell all agents to save and end."""
        if not self.stopping:
            self.stopping = True
            self.deadline = min(self.deadline, time.monotonic() + self.job.agent.grace_s + LINGER_S)
        self.send(number)

    def ended(self, node: int, code: int) -> None:
        """An agent ended: start it again, or see that the others end too."""
        del self.agents[node]
        killed = code < 0 or code == KILLED_CONTAINER
        if killed and not self.stopping and self.may_restart(node, code):
            self.start(node)
            return
        if killed:
            code = STOPPED if self.stopping else FAILED
        self.codes[node] = code
        if code == STOPPED:
            self.stop(signal.SIGTERM)
        self.deadline = min(self.deadline, time.monotonic() + LINGER_S)

    def start_all(self) -> None:
        """Start a launch."""
        self.codes.clear()
        self.stopping, self.deadline = self.told > 0, math.inf
        for node in range(self.job.nodes):
            self.start(node)

    def take_lease(self) -> bool:
        """Wait for the GPUs that the job needs; False when asked to stop meanwhile."""
        visible = visible_devices()
        wanted = wanted_devices(self.job, visible)
        told = False
        while True:
            lease = try_lease(wanted, visible)
            if lease is not None:
                self.lease = lease
                return True
            if not told:
                record_event(self.run, "pending", reason=f"waiting for GPUs: {wanted} of {', '.join(visible)}")
                told = True
            if self.stop_requests:
                return False
            time.sleep(0.5)

    def start(self, node: int) -> None:
        """Start the agent of a node."""
        command, variables = self.nodes.command(node, self.launch, self.lease)
        environment = without_ranks() | variables
        with (self.run / "logs" / f"node-{node}.log").open("ab") as log:
            kept = [*self.lease.handles, *self.kept]
            if node == 0 and self.first is not None:
                first, self.first = self.first, None
                message = (command[2:], environment, self.folder, Loaded(self.job, "", True), os.getpid())
                self.agents[0] = first.tell(message, [log.fileno(), *kept])
                return
            self.agents[node] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.folder, start_new_session=True, pass_fds=kept,
                preexec_fn=functools.partial(end_with, os.getpid()),
            )  # fmt: skip

    def may_restart(self, node: int, code: int) -> bool:
        """Whether a killed agent is started again: the budget counts restarts without progress."""
        step = steps_committed(self.run)
        self.used = 1 if step > self.progress else self.used + 1
        self.progress = step
        record_event(self.run, "agent_lost", node=node, code=code)
        return self.used <= self.job.agent.restarts

    def send(self, number: signal.Signals) -> None:
        """Signal all agents."""
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.send_signal(number)


def worst(codes: list[int]) -> int:
    """One exit code for all nodes: the job is wrong, else it failed, else it was stopped, else it is done."""
    if WRONG_JOB in codes:
        return WRONG_JOB
    failed = [code for code in codes if code not in (DONE, STOPPED)]
    return failed[0] if failed else max(codes, default=FAILED)


def serve(run: Path, job: Job, docker: bool, kept: Sequence[int] = (), first: Waiting | None = None) -> NoReturn:
    """Run a job to its end; the exit code is kept in `exit.json`, because the parent may be gone.

    `kept`: files that supervisor and agents hold; `first`: node 0's agent, which waits already.
    """
    try:
        nodes = _nodes(run, job, docker)
        nodes.prepare()
        try:
            code = Supervisor(run, job, nodes, kept, first).main()
        finally:
            nodes.finish()
    except JobError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        record_event(run, "ended", code=WRONG_JOB, reason=str(error))
        code = WRONG_JOB
    write_json(run / "exit.json", {"code": code, "time": time.time()})
    sys.exit(code)


def _nodes(run: Path, job: Job, docker: bool) -> Nodes:
    site = read_json(run / "plan" / "docker.json")
    if not docker or site is None:
        return Nodes(run, job)
    from trainer.launch.docker.platform import DockerNodes, DockerSite

    return DockerNodes(run, job, DockerSite(**site))


if __name__ == "__main__":
    from trainer.config.load import load_job

    serve(Path(sys.argv[1]), load_job(Path(sys.argv[1]) / "job.yaml"), docker=False)
