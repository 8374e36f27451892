"""`python -m trainer.launch.supervisor RUN`: keeps the agents of a local job running, as kubelet keeps pods.

It holds the lease of the GPUs, starts an agent that was killed again, and starts all again after a preemption.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from trainer.config import Job
from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB, JobError
from trainer.folder import steps_committed
from trainer.launch.lease import Lease, try_lease, visible_devices, wanted_devices
from trainer.load import load_job
from trainer.record import read_json, record_event, write_json

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

    def __init__(self, run: Path, job: Job, nodes: Nodes) -> None:
        """Nothing is started yet; `nodes` says what an agent's process is here."""
        self.run, self.job, self.nodes = run, job, nodes
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        self.launch = 0
        self.stop_requests = 0
        self.preempted = False
        self.used, self.progress = 0, -1
        self.lease = Lease([])

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal: USR2 preempts, TERM and INT end for good."""
        if number == signal.SIGUSR2:
            self.preempted = True
        else:
            self.stop_requests += 1

    def main(self) -> int:
        """Run all agents to the end; return the job's exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self.handle)
        if not self.take_lease():
            return STOPPED
        for node in range(self.job.nodes):
            self.start(node)
        codes: dict[int, int] = {}
        told = 0
        while True:
            if self.stop_requests > told:
                told = self.stop_requests
                if told == 1:
                    self.send(signal.SIGTERM)
                else:
                    self.nodes.kill()
                    self.send(signal.SIGKILL)
            if self.preempted and not told:
                self.preempted = False
                self.send(signal.SIGUSR2)
            for node, agent in list(self.agents.items()):
                code = agent.poll()
                if code is None:
                    continue
                del self.agents[node]
                killed = code < 0 or code == KILLED_CONTAINER
                if killed and not told and self.may_restart(node, code):
                    self.start(node)
                else:
                    codes[node] = FAILED if killed else code
            if not self.agents:
                code = worst(list(codes.values()))
                if code != STOPPED or told:
                    return STOPPED if told > 1 else code
                self.launch += 1
                record_event(self.run, "requeued", launch=self.launch)
                codes.clear()
                for node in range(self.job.nodes):
                    self.start(node)
            time.sleep(0.03)

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
        with (self.run / "logs" / f"node-{node}.log").open("ab") as log:
            self.agents[node] = subprocess.Popen(
                command, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, pass_fds=self.lease.handles, preexec_fn=_end_with_parent,
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


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: stop with a checkpoint when this process is gone


def worst(codes: list[int]) -> int:
    """One exit code for all nodes: the job is wrong, else it failed, else it was stopped, else it is done."""
    if WRONG_JOB in codes:
        return WRONG_JOB
    failed = [code for code in codes if code not in (DONE, STOPPED)]
    return failed[0] if failed else max(codes, default=FAILED)


def main() -> None:
    """Entry point; the exit code is kept in `exit.json`, because the parent may be gone."""
    run = Path(sys.argv[1])
    if "--follow" in sys.argv:
        _end_with_parent()
    try:
        job = load_job(run / "job.yaml")
        nodes = _nodes(run, job)
        nodes.prepare()
        try:
            code = Supervisor(run, job, nodes).main()
        finally:
            nodes.finish()
    except JobError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        record_event(run, "ended", code=WRONG_JOB, reason=str(error))
        code = WRONG_JOB
    write_json(run / "exit.json", {"code": code, "time": time.time()})
    sys.exit(code)


def _nodes(run: Path, job: Job) -> Nodes:
    site = read_json(run / "plan" / "docker.json")
    if "--docker" not in sys.argv or site is None:
        return Nodes(run, job)
    from trainer.launch.docker import DockerNodes, DockerSite

    return DockerNodes(run, job, DockerSite(**site))


if __name__ == "__main__":
    main()
