"""The agent: it starts the ranks of one node, watches them, and meets the other agents when something happens.

It outlives its ranks: it names the first failure, restarts within the budget, relays stop requests. How agents meet is
in `trainer.agent.rendezvous`; what went wrong is found out in `trainer.agent.diagnosis`.
"""

import contextlib
import os
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from trainer.agent.awake_clock import CLOCK
from trainer.agent.checkpoint_writer import CheckpointWriter
from trainer.agent.diagnosis import STACKS_S, Diagnosis
from trainer.agent.failure import Failure, paragraph
from trainer.agent.fork_server import PROCESSES, ensure_fork_server
from trainer.agent.health import LIMIT
from trainer.agent.kv_store import PeerLost
from trainer.agent.last_word import judge, say
from trainer.agent.preflight import LOOPBACK, network_settings
from trainer.agent.rank_environment import rank_defaults, rank_variables, threads_per_rank
from trainer.agent.rank_process import run_rank
from trainer.agent.rendezvous import NodeRendezvous
from trainer.agent.restarts import RestartPolicy
from trainer.agent.rounds import Ended, RanksStopped, RendezvousTimeoutError
from trainer.agent.scratch_folder import remove_leftovers
from trainer.checkpoint.memory import FOR_SHARDS, Memory
from trainer.config.job import Job
from trainer.errors import FAILED, HIDDEN, STOPPED, WRONG_JOB
from trainer.reporting.heartbeat import HEARTBEAT, Heartbeat
from trainer.run import attempts
from trainer.run.folder import RunFolder
from trainer.run.history import agents_killed
from trainer.run.log_tail import Tail
from trainer.signals import FLAG, SIGNALS, kill_group
from trainer.wiring import variables
from trainer.wiring.node import Wiring

LAST_WORDS_S = 0.3
"""How long another agent's alarm, or the end of its connection, may come after what its failure causes here."""
KILL_S = 10.0
"""How long killed ranks may take to end. One in uninterruptible sleep is abandoned then."""


class NodeAgent:
    """Supervises the ranks of one node."""

    def __init__(self, job: Job, job_file: Path, run: RunFolder, wiring: Wiring, secret: bytes, folder: Path) -> None:
        """`secret`: of the run; `folder`: of this agent alone."""
        self.job, self.job_file, self.run, self.wiring, self.folder = job, job_file, run, wiring, folder
        # What all ranks hold alike is kept once; a shard is kept for its rank.
        sharded = job.parallel == "fsdp"
        self.memories = [Memory.make(FOR_SHARDS) for _ in range(job.ranks_per_node)] if sharded else [Memory.make()]
        self.writers = [
            CheckpointWriter(folder, memory, wiring.node_rank, f"writer-{index}")
            for index, memory in enumerate(self.memories)
        ]
        self.restarts = RestartPolicy(job, run, say, self.memories[0])
        self.rendezvous = NodeRendezvous(
            wiring, secret, job.agent.start_timeout_s, job.agent.rejoin_timeout_s, lambda: FLAG.requested is not None,
            self.restarts.next_attempt, say,
        )  # fmt: skip
        if wiring.platform == "kubernetes" and attempts.newest(run) >= 0:  # the nodes met before: one is not back yet
            self.rendezvous.in_vain = STOPPED
            self.restarts.killed = agents_killed(run.read_events())
        self.heartbeat = Heartbeat(folder / HEARTBEAT, job.ranks_per_node)
        (folder / LIMIT).write_text(str(max(job.agent.start_timeout_s, job.agent.hang_timeout_s)))
        self.threads = threads_per_rank(job, wiring)
        self.environment = rank_defaults(run, wiring, self.threads)
        for name, (value, why) in network_settings(wiring).items():
            self.environment[name] = value
            if value.strip("=") != LOOPBACK:  # nothing to know where all is on one machine; `--explain` says it
                say(f"{name}={value}: {why}")
        self.environment[variables.HEARTBEAT] = str(folder / HEARTBEAT)
        self.environment[variables.SESSION] = str(run.job)
        self.diagnosis = Diagnosis(job, run, wiring, self.heartbeat, folder)
        # Of a shared run folder the log of rank 0 is shown; logs that go with the node are all shown.
        shown = int(wiring.node_rank == 0) if variables.run_is_shared() else job.ranks_per_node
        self.tails = [Tail(run.rank_log(self.diagnosis.first_rank + local_rank)) for local_rank in range(shown)]
        self.processes: list[BaseProcess] = []
        self.stop_began: float | None = None

    def supervise(self) -> tuple[int, str]:
        """Run the ranks to their end; return the exit code and, unless it is 0, the reason."""
        try:
            return self._run_rounds(), "stopped on request with a checkpoint saved"
        except Ended as end:
            # srun answers with the highest code of all agents and SIGTERMs the others when one fails: without a vote,
            # 75 here would hide why the first one failed, and requeue the job for ever. A preemption sends USR2 first.
            if end.code == STOPPED and self.wiring.platform == "slurm" and "SIGUSR2" not in FLAG.seen:
                return FAILED, f"{end} (SIGTERM from Slurm: another agent failed, or the job was cancelled)"
            known = end.code in (FAILED, STOPPED, WRONG_JOB) or self.wiring.platform != "kubernetes"
            return (end.code if known else FAILED), str(end)  # what else a script ends with would start its pod again
        except RendezvousTimeoutError as error:
            failure, code = self.rendezvous.failure, self.rendezvous.in_vain
            if code == STOPPED:
                return code, f"{error}. The last checkpoint stands, and the run goes on when all nodes are there"
            return code, paragraph(failure, f"Then {error}.") if failure else f"peer lost: {error}"
        except Exception as error:
            code, reason = judge(error)
            self.rendezvous.end_all(reason, code)
            return code, reason
        finally:
            self._end_ranks()
            patience = time.monotonic() + (KILL_S if self._stop_requested() else self.job.agent.grace_s)
            for writer in self.writers:
                writer.close(max(0.0, patience - time.monotonic()))
            self.rendezvous.shutdown()

    def _run_rounds(self) -> int:
        """Rounds of rendezvous, start and watch, until all ranks are done; return their exit code."""
        while True:
            try:
                code = self._run_round()
                if code is not None and not self._stays(code):
                    return code
            except RanksStopped as end:
                if not self._stays(end.code):
                    raise
            self._end_ranks()
            self._copy_logs()  # before the last word on it

    def _run_round(self) -> int | None:
        """One round; return the exit code of the ranks, None when there must be another round."""
        failure = None
        try:
            self._start()
            failure = self._watch()
            if failure is None and not self._living() and self._others_done():
                return max(process.exitcode or 0 for process in self.processes)
        except PeerLost as error:
            failure = self.diagnosis.lost_node(0, str(error))
        except (EOFError, ConnectionError) as error:  # the fork server is gone; the next round starts another
            failure = self.diagnosis.lost_fork_server(error)
        if failure is not None and self._stop_requested():
            meanwhile = f"meanwhile [{failure.kind}] {failure.message}; the last checkpoint stands"
            raise RanksStopped(f"stopped on request; {meanwhile}", STOPPED)
        self.rendezvous.failure = failure or self.rendezvous.failure
        return None

    def _stays(self, code: int) -> bool:
        """Whether this agent goes on after a stop that others were asked for; it forgets the stop then."""
        asked_elsewhere = self.stop_began is not None and FLAG.requested is None
        stays = code == STOPPED and self.rendezvous.alone and asked_elsewhere
        self.stop_began = None if stays else self.stop_began
        return stays

    def _start(self) -> None:
        """Meet the other agents and start the ranks."""
        ensure_fork_server()
        agreed = self.rendezvous.next_round()
        if not (self.folder / HEARTBEAT).exists():
            problem = f"something removed {self.folder}, the folder of this node's agent, while the job ran. Its ranks "
            remedy = "cannot be started again without it. Set TMPDIR to a folder that nobody cleans up, and run again"
            raise Ended(problem + remedy, FAILED)
        say(f"attempt {agreed.attempt} begins")
        self.diagnosis.start_attempt(agreed.attempt)
        for local_rank in range(self.job.ranks_per_node):
            self.heartbeat.clear(local_rank)
            environment = rank_variables(self.job, self.wiring, local_rank, agreed) | self.environment
            keeps = local_rank % len(self.memories)
            environment |= self.memories[keeps].environment() | self.writers[keeps].environment()
            roots = self.diagnosis.roots
            arguments = (environment, self.job, self.run, self.job_file, self.threads, HIDDEN, roots)
            process = PROCESSES.Process(target=run_rank, args=arguments)
            process.start()
            self.processes.append(process)
        self.spawned = time.monotonic()
        pids = {self.diagnosis.first_rank + local: process.pid for local, process in enumerate(self.processes)}
        self.run.record("ranks", node=self.wiring.node_rank, attempt=agreed.attempt, agent=os.getpid(), pids=pids)

    def _end_ranks(self) -> None:
        """End ranks at once: what they would still do is lost, what is committed is not."""
        for process in self.processes:
            assert process.pid is not None
            ended = process.exitcode is not None
            if not kill_group(process.pid, ended) and not ended:  # with loader workers and the like; or it has none yet
                process.kill()
        end = time.monotonic() + KILL_S
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.processes = []
        remove_leftovers(self.folder)

    def _living(self) -> list[tuple[int, BaseProcess]]:
        """The ranks that have not ended, each with its local rank."""
        return [(rank, process) for rank, process in enumerate(self.processes) if process.exitcode is None]

    def _stop_requested(self) -> bool:
        return self.stop_began is not None or FLAG.requested is not None

    def _copy_logs(self) -> None:
        with contextlib.suppress(OSError):  # nobody reads our output any more, or its disk is full: the logs have it
            for tail in self.tails:
                tail.copy()

    def _watch(self) -> Failure | None:
        """Wait until all ranks are done (None), or something failed here (a failure) or elsewhere (None)."""
        while True:
            sentinels = [process.sentinel for _, process in self._living()]
            wakes = [writer.wakes() for writer in self.writers]
            connection.wait([*wakes, self.rendezvous.wakes(), *sentinels], 0.1)
            for writer in self.writers:
                writer.look()
            living = self._living()  # first: a rank that ends from here on is looked at, with its last lines, next time
            self._copy_logs()
            if self.diagnosis.failed(self.processes):
                return self._died()
            if not living:
                return None
            wishes = self.rendezvous.look()
            self._relay_stop(wishes.stop)
            if hung := self.diagnosis.find_hung(self.processes, self.spawned, alarmed=wishes.hung):
                self.rendezvous.compare(hung, STACKS_S)
                return hung
            if lost := self.rendezvous.lost_peer():
                return self.diagnosis.lost_node(*lost)
            if wishes.next_round:
                return self.diagnosis.find_cause(self.processes, self._cause_is_elsewhere)

    def _died(self) -> Failure:
        """Describe why a rank ended badly. Raises Ended: by a stop request, which a script need not handle."""
        codes = [self.processes[index].exitcode or 0 for index in self.diagnosis.failed(self.processes)]
        if self._stop_requested() or -codes[0] in SIGNALS:
            self._relay_stop(True)
            end = time.monotonic() + 1
            while time.monotonic() < end and self._living():
                time.sleep(0.02)
            if all(code < 0 for code in codes):
                raise RanksStopped("stopped on request; the ranks were ended before they had trained a step", STOPPED)
        failure = self.diagnosis.find_cause(self.processes, self._cause_is_elsewhere)
        assert failure is not None
        self.rendezvous.alarm(failure)
        if self.wiring.nodes == 1 or not failure.is_consequence:
            return failure
        end = time.monotonic() + LAST_WORDS_S
        while time.monotonic() < end and not self._cause_is_elsewhere():
            time.sleep(0.02)
        lost = self.rendezvous.lost_peer()
        return self.diagnosis.lost_node(*lost) if lost else failure

    def _cause_is_elsewhere(self) -> bool:
        return self.rendezvous.look().cause_known or self.rendezvous.lost_peer() is not None

    def _relay_stop(self, wanted: bool) -> None:
        """Pass a stop request on once, to the ranks and the other agents. Raises Ended: the grace period is over."""
        if not wanted and not self._stop_requested():
            return
        if self.stop_began is None:
            self.stop_began = CLOCK.now()
            self.rendezvous.stop_all()
            for _, process in self._living():
                process.terminate()  # SIGTERM
        grace_s = self.job.agent.grace_s
        if CLOCK.now() - self.stop_began > grace_s:
            late = f"the ranks did not finish a step and a save within agent.grace_s={grace_s:.0f} s"
            raise RanksStopped(f"stopped on request, but {late}; the last checkpoint stands", STOPPED)

    def _others_done(self) -> bool:
        """Wait until every node's ranks are done; False when one asks for another round instead."""
        while not self.rendezvous.all_done():
            if self.rendezvous.look().next_round:
                return False
            if self.rendezvous.lost_peer() is not None:
                break  # the ranks here are done, and a task's end is agreed on by all ranks
            self.rendezvous.wait(0.1)
        return True
