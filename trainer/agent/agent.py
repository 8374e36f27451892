"""The agent: torch's elastic agent, with fixed ranks, forked processes, heartbeats and our own escalation.

One per node. It outlives its ranks: it names the first failure, restarts within the budget, relays stop requests.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from trainer.agent.diagnosis import STACKS_S, Autopsy, process_state
from trainer.agent.failure import Failure, paragraph
from trainer.agent.kv_store import PeerLost
from trainer.agent.rank_process import run_rank
from trainer.agent.rendezvous import Ended, NodeRendezvous
from trainer.agent.shared_memory import remove_leftovers
from trainer.checkpoint.memory import Memory
from trainer.config.job import Job
from trainer.errors import FAILED, STOPPED
from trainer.records import record_event
from trainer.reporting.heartbeat import HEARTBEAT, VARIABLE, Heartbeat
from trainer.run.folder import is_shared
from trainer.run.log_tail import Tail
from trainer.signals import FLAG, SIGNALS
from trainer.wiring.node import Wiring

logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # we say ourselves what happens

# Ours stay: torch's raise an exception wherever the agent happens to be (read by torch >= 2.9).
os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""

POLL_S = 0.1
LAST_WORDS_S = 0.3
"""For the record of a rank that died, or the end of an agent's connection, to appear after what it causes."""


class NodeAgent(LocalElasticAgent):
    """Supervises the ranks of one node."""

    def __init__(
        self, job: Job, job_file: Path, run: Path, wiring: Wiring, rendezvous: NodeRendezvous, threads: int,
        folder: Path, rank_environment: dict[str, str], memory: Memory | None,
    ) -> None:  # fmt: skip
        """`folder`: of this agent alone; `rank_environment`: what each rank gets besides torchrun's variables.

        `memory`: where ranks leave their state when another fails.
        """
        logs = run / "logs"
        spec = WorkerSpec(
            role="default",
            local_world_size=job.ranks_per_node,
            entrypoint=run_rank,
            args=(job, str(run), str(job_file), threads, str(logs)),
            rdzv_handler=rendezvous,
            max_restarts=job.agent.restarts,
        )
        super().__init__(spec, DefaultLogsSpecs(str(folder)), start_method="forkserver")
        self.job, self.run_folder, self.wiring, self.rendezvous = job, run, wiring, rendezvous
        self.heartbeat = Heartbeat(folder / HEARTBEAT, job.ranks_per_node)
        self.memory, self.folder = memory, folder
        self.rank_environment = rank_environment | {VARIABLE: str(folder / HEARTBEAT)}
        if memory is not None:
            self.rank_environment |= memory.environment()
        first = wiring.node_rank * job.ranks_per_node
        shown = range(0 if wiring.node_rank else 1) if is_shared() else range(first, first + job.ranks_per_node)
        self.tails = [Tail(logs / f"rank-{rank}.log") for rank in shown]  # logs that go with the node are all shown
        self.autopsy = Autopsy(job, run, wiring, self.heartbeat)
        self.asked: float | None = None

    def _set_local_rank_env(self, worker_env: dict[str, Any], local_rank: int, spec: WorkerSpec) -> None:
        super()._set_local_rank_env(worker_env, local_rank, spec)
        worker_env.update(self.rank_environment)
        worker_env["MUSTER_ATTEMPT"] = str(self.rendezvous.plan["attempt"])
        worker_env["TORCHELASTIC_RESTART_COUNT"] = str(self.rendezvous.round - 1)

    def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec) -> Any:
        """Ranks by node rank; torch's own way is a collective over the store for the same answer."""
        os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
        return super()._assign_worker_ranks(store, group_rank, group_world_size, spec)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.autopsy.begin(self.rendezvous.plan["attempt"])
        for local_rank in range(self.job.ranks_per_node):
            self.heartbeat.clear(local_rank)
        if self.memory is not None:
            self.memory.forget_answers(self.job.ranks_per_node)
        pids: dict[int, Any] = super()._start_workers(worker_group)
        FLAG.install()  # torch before 2.9 has just replaced our handlers
        self.spawned = time.monotonic()
        first = self.autopsy.first_rank()
        record_event(
            self.run_folder,
            "ranks",
            node=self.wiring.node_rank,
            attempt=self.autopsy.attempt,
            agent=os.getpid(),
            pids={first + local: pid for local, pid in pids.items()},
        )
        return pids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """End ranks at once: what they would still do is lost, what is committed is not."""
        for process in self._processes():
            end_group(process.pid)
        # One in uninterruptible sleep is abandoned after the bound; a stopped one dies of SIGKILL too.
        super()._shutdown(signal.SIGKILL, timeout=10)
        self._pcontext = None
        remove_leftovers(self.folder)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._stop_workers(self._worker_group)

    def _processes(self) -> list[Any]:
        context: Any = self._pcontext
        return list(context._pc.processes) if context is not None and context._pc is not None else []

    def _invoke_run(self, role: str = "default") -> RunResult:
        """Rounds of rendezvous, start and watch, until the ranks are done or the agents agree to end."""
        group = self._worker_group
        while True:
            result, failure = None, None
            try:
                self._initialize_workers(group)
                result, failure = self._watch()
                if result is not None and self._others_done():
                    return result
            except PeerLost as error:
                failure = self.autopsy.peer(0, str(error))
            except (EOFError, ConnectionError) as error:  # the template is gone; the next round starts another
                failure = self.autopsy.template(error)
            if failure is not None and (self.asked is not None or FLAG.requested):
                raise Ended(
                    f"stopped on request; meanwhile [{failure.kind}] {failure.message}; the last checkpoint stands",
                    STOPPED,
                )
            if failure is not None:
                self.rendezvous.failure = failure.to_json()
            self._save_state()
            self._stop_workers(group)
            self._copy_log()  # before the last word on it

    def _save_state(self) -> None:
        """Let ranks that live hand over what the next attempt goes on from; one that starts, or is stopped, cannot."""
        if self.memory is None:
            return
        living = [(index, process) for index, process in enumerate(self._processes()) if process.exitcode is None]
        self.memory.ask([
            (index, process) for index, process in living
            if self.heartbeat.read(index).phase != "starting" and process_state(process.pid) != "T"
        ])  # fmt: skip

    def _copy_log(self) -> None:
        for tail in self.tails:
            tail.copy()

    def _watch(self) -> tuple[RunResult | None, Failure | None]:
        """Wait until all ranks are done, or something failed here (a failure) or elsewhere (none).

        Raises:
            PeerLost: node 0 does not answer.
        """
        processes = self._processes()
        while True:
            connection.wait([process.sentinel for process in processes if process.exitcode is None], POLL_S)
            codes = [process.exitcode for process in processes]
            self._copy_log()
            if self.autopsy.failed(processes):
                return None, self._died(processes)
            if None not in codes:
                first = self.autopsy.first_rank()
                return RunResult(WorkerState.SUCCEEDED, {first + local: code for local, code in enumerate(codes)}), None
            news = self.rendezvous.news()
            self._relay_stop(news == "stop")
            hung = self.autopsy.find_hung(processes, self.spawned, alarmed=news == "hung")
            if hung is not None:
                self.rendezvous.announce(hung.to_json(), STACKS_S)
                return None, hung
            if news in ("round", "hung"):
                return None, self._died(processes) if self.autopsy.failed(processes) else None
            lost = self.rendezvous.lost_peer()
            if lost is not None:
                return None, self.autopsy.peer(*lost)

    def _died(self, processes: list[Any]) -> Failure:
        """Some rank ended badly: describe the first cause.

        Raises:
            Ended: it was ended by a stop request, which a script need not handle.
        """
        codes = [processes[index].exitcode for index in self.autopsy.failed(processes)]
        if self.asked is not None or FLAG.requested or -codes[0] in SIGNALS:
            self._relay_stop(True)
            end = time.monotonic() + 1
            while time.monotonic() < end and any(process.exitcode is None for process in processes):
                time.sleep(0.02)
            if all(code < 0 for code in codes):
                raise Ended("stopped on request; the ranks were ended before they had trained a step", STOPPED)
        failure = self.autopsy.describe(processes)
        end = time.monotonic() + LAST_WORDS_S
        while failure.kind == "peer lost" and self.wiring.nodes > 1 and time.monotonic() < end:
            lost = self.rendezvous.lost_peer()
            if lost is not None:
                return self.autopsy.peer(*lost)
            if self.rendezvous.news() in ("round", "hung"):
                break  # another node knows more
            time.sleep(0.02)
        return failure

    def _relay_stop(self, wanted: bool) -> None:
        """Pass a stop request on once, to the ranks and to the other agents; enforce the grace period.

        Raises:
            Ended: the ranks did not stop in time.
        """
        now = time.monotonic()
        if self.asked is None:
            if not wanted and FLAG.requested is None:
                return
            self.asked = now
            self.rendezvous.tell_stop()
            for process in self._processes():
                if process.exitcode is None:
                    os.kill(process.pid, signal.SIGTERM)
        if now - self.asked > self.job.agent.grace_s:
            raise Ended(
                f"stopped on request, but the ranks did not finish a step and a save within agent.grace_s="
                f"{self.job.agent.grace_s:.0f} s; the last checkpoint stands", STOPPED,
            )  # fmt: skip

    def _others_done(self) -> bool:
        """Wait until every node's ranks are done; False when one asks for another round instead."""
        while not self.rendezvous.all_done():
            if self.rendezvous.news() in ("round", "hung"):
                return False
            if self.rendezvous.lost_peer() is not None:
                break  # the ranks here are done, and a task's end is agreed on by all ranks
            time.sleep(0.02)
        return True

    def _exit_barrier(self) -> None:
        """Replaced by `_others_done`."""


def end_group(pid: int) -> None:
    """Kill a rank and what it started, such as loader workers."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone, or it has not made its group yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def supervise(agent: NodeAgent) -> tuple[int, str | None]:
    """Run the agent to its end; return the exit code and, after a failure, its reason."""
    try:
        result = agent.run()
    except Ended as end:
        # srun answers with the highest code of all agents and SIGTERMs the others when one fails: without a vote,
        # 75 here would hide why the first one failed, and requeue the job for ever. A preemption sends USR2 first.
        if end.code == STOPPED and agent.wiring.platform == "slurm" and "SIGUSR2" not in FLAG.seen:
            return FAILED, f"{end} (SIGTERM from Slurm: another agent failed, or the job was cancelled)"
        return end.code, str(end)
    except SignalException:  # torch's handler, in the moment before ours was back
        return STOPPED, "stopped on request; the last checkpoint stands"
    except RendezvousTimeoutError as error:
        if agent.rendezvous.failure is None:
            return FAILED, f"peer lost: {error}"
        return FAILED, paragraph(Failure(**agent.rendezvous.failure), f"Then {error}.", agent.run_folder)
    except OSError as error:
        return FAILED, str(error)
    finally:
        agent.rendezvous.shutdown()
    codes = {int(value) for value in result.return_values.values()}
    return max(codes, default=FAILED), None
