"""`python -m muster supervisor RUN`: keeps the agents of a local job running, as kubelet keeps pods.

It holds the lease of the GPUs, starts an agent that was killed again, and starts all again after a preemption.
"""

import argparse
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from trainer.config.job import Job
from trainer.errors import FAILED, STOPPED, WRONG_JOB, JobError
from trainer.launch.local.gpu_lease import Lease, holders, lock_folder, try_lease
from trainer.launch.local.platform import Nodes, Supervised, handle_of, is_alive
from trainer.launch.platform import combined_exit_code, find_platform
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder
from trainer.run.output import never_fail
from trainer.run.ownership import ForeignRun, check_owner, forbid_group_writes
from trainer.run.reserve import make_room
from trainer.signals import ORPHANED, SUPERVISOR_SIGNALS, set_parent_death_signal
from trainer.wiring.devices import visible_devices, wanted_devices
from trainer.wiring.variables import without_ranks

POLL_S = 0.03
LINGER_S = 60.0
"""Once one agent has ended, how long the others may take to end too: what `srun --wait` is on Slurm."""
KILLED_CONTAINER = 137
"""What `docker run` answers for a container that was killed, for memory for example."""


class Supervisor:
    """Starts, watches and ends the agents of one run."""

    def __init__(self, run: RunFolder, job: Job, nodes: Nodes, held: Sequence[int] = ()) -> None:
        """`nodes`: how an agent is started; `held`: files that the supervisor and its agents keep open."""
        self.run, self.job, self.nodes, self.held = run, job, nodes, held
        folder = (read_json(run.source) or {}).get("working_directory", "")
        self.folder = folder if os.path.isdir(folder) else None
        self.lease = Lease([])
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        self.codes: dict[int, int] = {}
        self.launch = self.stop_requests = self.passed_on = 0
        self.preempted = False
        self.stopping = False
        """Whether the agents of this launch are to end, whoever asked for it."""
        self.deadline = math.inf
        """When those that are still there are killed."""
        self.used, self.lost, self.progress = 0, 0, -1

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal: USR2 preempts, TERM and INT end for good, a second time at once; HUP counts once."""
        if number == signal.SIGUSR2:
            self.preempted = True
        elif number != ORPHANED or not self.stop_requests:
            self.stop_requests += 1

    def main(self) -> int:
        """Run all agents to the end; return the job's exit code."""
        for number in SUPERVISOR_SIGNALS:
            signal.signal(number, self.handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISOR_SIGNALS)
        if not self.take_lease():
            return STOPPED
        while True:
            self.run_launch()
            code = STOPPED if self.passed_on > 1 else combined_exit_code(list(self.codes.values()))
            if code != STOPPED or self.passed_on:
                return code
            self.launch += 1
            self.run.record("requeued", launch=self.launch)

    def take_lease(self) -> bool:
        """Wait for the GPUs that the job needs; False when asked to stop meanwhile."""
        visible = visible_devices()
        wanted = wanted_devices(self.job, visible)
        if not wanted:
            return self.take_turn()
        folder, problem = lock_folder(visible)
        if problem:
            self.run.record("notice", message=problem)
        lease = try_lease(wanted, visible, folder)
        if lease is None:
            which = f"{wanted} of {', '.join(visible)}"
            held = f" (held: {text})" if (text := holders(visible, folder)) else ""
            reason = f"waiting for GPUs: {which}{held}; it starts when other runs here release them"
            self.run.record("pending", reason=reason)
        while lease is None:
            if self.stop_requests:
                return False
            time.sleep(0.5)
            lease = try_lease(wanted, visible, folder)
        self.lease = lease
        return True

    def take_turn(self) -> bool:
        """Without GPUs, wait for the earlier runs of the same sweep; False when asked to stop meanwhile."""
        sweep = read_json(Path((read_json(self.run.part_of) or {}).get("sweep", self.run)) / self.run.sweep.name) or {}
        runs = [str(path) for path in sweep.get("runs", [])]
        earlier = [RunFolder(Path(path)) for path in runs[: runs.index(str(self.run))]] if str(self.run) in runs else []
        said = None
        while busy := next((run for run in earlier if is_alive(read_json(run.handle) or {})), None):
            if self.stop_requests:
                return False
            if said != busy:
                self.run.record("pending", reason=f"waiting for {busy.name}, which comes before it in the sweep")
                said = busy
            time.sleep(0.5)
        return True

    def run_launch(self) -> None:
        """Start all agents, and see them to their ends."""
        self.codes.clear()
        self.stopping, self.deadline = self.passed_on > 0, math.inf
        for node in range(self.job.nodes):
            self.start(node)
        while self.agents:
            time.sleep(POLL_S)
            self.pass_requests_on()
            for node, agent in list(self.agents.items()):
                code = agent.poll()
                if code is not None:
                    self.handle_end(node, code)

    def start(self, node: int) -> None:
        command, variables = self.nodes.command(node, self.launch, self.lease)
        with self.run.node_log(node).open("ab") as log:
            self.agents[node] = subprocess.Popen(
                command, env=without_ranks() | variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.folder, start_new_session=True, pass_fds=[*self.lease.handles, *self.held],
                preexec_fn=functools.partial(set_parent_death_signal, os.getpid()),
            )  # fmt: skip

    def pass_requests_on(self) -> None:
        """Hand stop requests on to the agents: the first lets them save, the second ends them at once."""
        if self.stop_requests > self.passed_on:
            self.passed_on = self.stop_requests
            self.stop(signal.SIGTERM)
        elif self.preempted:
            self.stop(signal.SIGUSR2)
        self.preempted = False
        if self.passed_on > 1 or time.monotonic() > self.deadline:
            self.nodes.kill()
            self.send(signal.SIGKILL)

    def stop(self, number: signal.Signals) -> None:
        if not self.stopping:
            self.stopping = True
            self.deadline = min(self.deadline, time.monotonic() + self.job.agent.grace_s + LINGER_S)
        self.send(number)

    def send(self, number: signal.Signals) -> None:
        for agent in self.agents.values():
            agent.send_signal(number)

    def handle_end(self, node: int, code: int) -> None:
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

    def may_restart(self, node: int, code: int) -> bool:
        """Whether a killed agent is started again, by the budgets of restarts: without progress, and in all."""
        step = self.run.steps_committed()
        self.used = 1 if step > self.progress else self.used + 1
        self.progress, self.lost = step, self.lost + 1
        self.run.record("agent_lost", node=node, code=code)
        return self.used <= self.job.agent.restarts and self.lost <= self.job.agent.restarts_total


def supervise(run: RunFolder, platform: str, held: Sequence[int]) -> int:
    """Run a job to its end; return its exit code, which is kept in `exit.json`, because the parent may be gone."""
    from trainer.config.load import merge_job, to_job

    forbid_group_writes()
    try:
        check_owner(run)
        job = to_job(merge_job(run.job))
        supervised = find_platform(platform)
        assert isinstance(supervised, Supervised)
        nodes = supervised.nodes(run, job)
        nodes.prepare()
        try:
            code = Supervisor(run, job, nodes, held).main()
        finally:
            nodes.finish()
    except ForeignRun as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return WRONG_JOB
    except JobError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        run.record("ended", code=WRONG_JOB, reason=str(error))
        code = WRONG_JOB
    except Exception as error:  # such as a docker command that is gone by now
        traceback.print_exc()
        reason = f"the supervisor failed: {type(error).__name__}: {error}. logs/supervisor.log has the traceback"
        run.record("ended", code=FAILED, reason=reason)
        code = FAILED
    make_room(run)
    try:
        write_json(run.exit, {"code": code, "time": time.time()})
    except OSError as error:
        print(f"ERROR: {run.exit} cannot be written: {error.strerror}. The exit code is {code}", file=sys.stderr)
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m muster supervisor")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--platform", default="local", help="what an agent is: a process (local) or a container")
    parser.add_argument("--held", type=int, nargs="*", default=[], help="open files to keep, such as the run's lock")
    options = parser.parse_args()
    never_fail()
    if options.held:  # whoever starts this may be killed before it can say what it started
        RunFolder(options.run).lock.write_text(json.dumps(handle_of(os.getpid())))
    sys.exit(supervise(RunFolder(options.run), options.platform, options.held))
