"""The agent: it starts the ranks of one node, watches them, and meets the other agents when something happens.

It outlives its ranks: it names the first failure, restarts within the budget, relays stop requests. How agents meet is
in `trainer.agent.rendezvous`; what went wrong is found out in `trainer.agent.diagnosis`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from trainer.agent.diagnosis import STACKS_S, Diagnosis, process_state
from trainer.agent.failure import Failure, paragraph
from trainer.agent.fork_server import PROCESSES
from trainer.agent.kv_store import PeerLost
from trainer.agent.rank_environment import rank_variables
from trainer.agent.rank_process import run_rank
from trainer.agent.rendezvous import NodeRendezvous
from trainer.agent.rounds import Ended, RendezvousTimeoutError
from trainer.agent.scratch_folder import remove_leftovers
from trainer.checkpoint.memory import Memory
from trainer.config.job import Job
from trainer.errors import FAILED, STOPPED
from trainer.reporting.heartbeat import HEARTBEAT, Heartbeat
from trainer.run.folder import RunFolder
from trainer.run.log_tail import Tail
from trainer.signals import FLAG, SIGNALS
from trainer.wiring import variables
from trainer.wiring.node import Wiring

POLL_S = 0.1
LAST_WORDS_S = 0.3
"""How long another agent's alarm, or the end of its connection, may come after what its failure causes here."""
KILL_S = 10.0
"""How long killed ranks may take to end. One in uninterruptible sleep is abandoned then."""


class NodeAgent:
    """Supervises the ranks of one node."""

    def __init__(
        self, job: Job, job_file: Path, run: RunFolder, wiring: Wiring, rendezvous: NodeRendezvous, threads: int,
        folder: Path, rank_environment: dict[str, str], memory: Memory | None,
    ) -> None:  # fmt: skip
        """`folder`: of this agent alone; `rank_environment`: what each rank gets besides torchrun's variables.

        `memory`: where ranks leave their state when another fails.
        """
        self.job, self.job_file, self.run_folder, self.wiring = job, job_file, run, wiring
        self.rendezvous, self.threads, self.folder, self.memory = rendezvous, threads, folder, memory
        self.heartbeat_file = folder / HEARTBEAT
        self.heartbeat = Heartbeat(self.heartbeat_file, job.ranks_per_node)
        self.rank_environment = rank_environment | {variables.HEARTBEAT: str(self.heartbeat_file)}
        if memory is not None:
            self.rank_environment |= memory.environment()
        first = wiring.node_rank * job.ranks_per_node
        shown = (
            range(0 if wiring.node_rank else 1)
            if variables.run_is_shared()
            else range(first, first + job.ranks_per_node)
        )
        self.tails = [Tail(run.rank_log(rank)) for rank in shown]  # logs that go with the node are all shown
        self.diagnosis = Diagnosis(job, run, wiring, self.heartbeat)
        self.processes: list[BaseProcess] = []
        self.stop_began: float | None = None

    def run(self) -> int:
        """Rounds of rendezvous, start and watch, until all ranks are done; return their exit code.

        Raises:
            Ended: the agents agree to end.
            RendezvousTimeoutError: some node did not come.
        """
        while True:
            failure = None
            try:
                self._start()
                failure = self._watch()
                if failure is None and self._all_done() and self._others_done():
                    return max(process.exitcode or 0 for process in self.processes)
            except PeerLost as error:
                failure = self.diagnosis.lost_node(0, str(error))
            except (EOFError, ConnectionError) as error:  # the fork server is gone; the next round starts another
                failure = self.diagnosis.lost_fork_server(error)
            if failure is not None and self._stop_requested():
                raise Ended(
                    f"stopped on request; meanwhile [{failure.kind}] {failure.message}; the last checkpoint stands",
                    STOPPED,
                )
            if failure is not None:
                self.rendezvous.failure = failure
            self._save_state()
            self.end_ranks()
            self._copy_log()  # before the last word on it

    def _start(self) -> None:
        """Meet the other agents and start the ranks."""
        agreed = self.rendezvous.next_round()
        if not self.heartbeat_file.exists():
            raise Ended(
                f"something removed {self.folder}, the folder of this node's agent, while the job ran. Its ranks "
                "cannot be started again without it. Set TMPDIR to a folder that nobody cleans up, and run again",
                FAILED,
            )
        self.diagnosis.start_attempt(agreed.attempt)
        for local_rank in range(self.job.ranks_per_node):
            self.heartbeat.clear(local_rank)
        for local_rank in range(self.job.ranks_per_node):
            environment = rank_variables(self.job, self.wiring, local_rank, agreed) | self.rank_environment
            process = PROCESSES.Process(
                target=run_rank, args=(environment, self.job, self.run_folder, self.job_file, self.threads)
            )
            process.start()
            self.processes.append(process)
        self.spawned = time.monotonic()
        first = self.diagnosis.first_rank
        self.run_folder.record(
            "ranks",
            node=self.wiring.node_rank,
            attempt=agreed.attempt,
            agent=os.getpid(),
            pids={first + local: process.pid for local, process in enumerate(self.processes)},
        )

    def end_ranks(self) -> None:
        """End ranks at once: what they would still do is lost, what is committed is not."""
        for process in self.processes:
            end_group(process)
        end = time.monotonic() + KILL_S
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.processes = []
        remove_leftovers(self.folder)

    def _all_done(self) -> bool:
        return all(process.exitcode is not None for process in self.processes)

    def _stop_requested(self) -> bool:
        return self.stop_began is not None or FLAG.requested is not None

    def _save_state(self) -> None:
        """Let ranks that live hand over what the next attempt goes on from; one that starts, or is stopped, cannot."""
        if self.memory is None:
            return
        living = [(index, process) for index, process in enumerate(self.processes) if process.exitcode is None]
        self.memory.ask([
            (index, process) for index, process in living
            if self.heartbeat.read(index).phase != "starting" and process_state(process.pid or 0) != "T"
        ])  # fmt: skip

    def _copy_log(self) -> None:
        for tail in self.tails:
            tail.copy()

    def _watch(self) -> Failure | None:
        """Wait until all ranks are done (None), or something failed here (a failure) or elsewhere (None).

        Raises:
            PeerLost: node 0 does not answer.
        """
        processes = self.processes
        while True:
            connection.wait([process.sentinel for process in processes if process.exitcode is None], POLL_S)
            self._copy_log()
            if self.diagnosis.failed(processes):
                return self._died(processes)
            if self._all_done():
                return None
            wishes = self.rendezvous.look()
            self._relay_stop(wishes.stop)
            hung = self.diagnosis.find_hung(processes, self.spawned, alarmed=wishes.hung)
            if hung is not None:
                self.rendezvous.compare(hung, STACKS_S)
                return hung
            lost = self.rendezvous.lost_peer()
            if lost is not None:
                return self.diagnosis.lost_node(*lost)
            if wishes.next_round:
                return self.diagnosis.find_cause(processes, self._cause_is_elsewhere)

    def _died(self, processes: list[BaseProcess]) -> Failure:
        """Some rank ended badly: describe the first cause.

        Raises:
            Ended: it was ended by a stop request, which a script need not handle.
        """
        codes = [processes[index].exitcode or 0 for index in self.diagnosis.failed(processes)]
        if self._stop_requested() or -codes[0] in SIGNALS:
            self._relay_stop(True)
            end = time.monotonic() + 1
            while time.monotonic() < end and not self._all_done():
                time.sleep(0.02)
            if all(code < 0 for code in codes):
                raise Ended("stopped on request; the ranks were ended before they had trained a step", STOPPED)
        failure = self.diagnosis.find_cause(processes, self._cause_is_elsewhere)
        assert failure is not None
        self.rendezvous.alarm(failure)
        end = time.monotonic() + LAST_WORDS_S
        while failure.is_consequence and self.wiring.nodes > 1 and time.monotonic() < end:
            lost = self.rendezvous.lost_peer()
            if lost is not None:
                return self.diagnosis.lost_node(*lost)
            if self.rendezvous.look().cause_known:
                break
            time.sleep(0.02)
        return failure

    def _cause_is_elsewhere(self) -> bool:
        return self.rendezvous.look().cause_known or self.rendezvous.lost_peer() is not None

    def _relay_stop(self, wanted: bool) -> None:
        """Pass a stop request on once, to the ranks and to the other agents; enforce the grace period.

        Raises:
            Ended: the ranks did not stop in time.
        """
        now = time.monotonic()
        if self.stop_began is None:
            if not wanted and FLAG.requested is None:
                return
            self.stop_began = now
            self.rendezvous.stop_all()
            for process in self.processes:
                if process.exitcode is None:
                    process.terminate()  # SIGTERM
        if now - self.stop_began > self.job.agent.grace_s:
            raise Ended(
                f"stopped on request, but the ranks did not finish a step and a save within agent.grace_s="
                f"{self.job.agent.grace_s:.0f} s; the last checkpoint stands", STOPPED,
            )  # fmt: skip

    def _others_done(self) -> bool:
        """Wait until every node's ranks are done; False when one asks for another round instead."""
        while not self.rendezvous.all_done():
            if self.rendezvous.look().next_round:
                return False
            if self.rendezvous.lost_peer() is not None:
                break  # the ranks here are done, and a task's end is agreed on by all ranks
            time.sleep(0.02)
        return True


def end_group(process: BaseProcess) -> None:
    """Kill a rank and what it started, such as loader workers."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone, or it has not made its group yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def supervise(agent: NodeAgent) -> tuple[int, str | None]:
    """Run the agent to its end; return the exit code and, after a failure, its reason."""
    try:
        return agent.run(), None
    except Ended as end:
        # srun answers with the highest code of all agents and SIGTERMs the others when one fails: without a vote,
        # 75 here would hide why the first one failed, and requeue the job for ever. A preemption sends USR2 first.
        if end.code == STOPPED and agent.wiring.platform == "slurm" and "SIGUSR2" not in FLAG.seen:
            return FAILED, f"{end} (SIGTERM from Slurm: another agent failed, or the job was cancelled)"
        return end.code, str(end)
    except RendezvousTimeoutError as error:
        if agent.rendezvous.failure is None:
            return FAILED, f"peer lost: {error}"
        return FAILED, paragraph(agent.rendezvous.failure, f"Then {error}.", agent.run_folder)
    except OSError as error:
        return FAILED, str(error)
    finally:
        agent.end_ranks()
        agent.rendezvous.shutdown()
