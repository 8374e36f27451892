"""The agent: torch's elastic agent, with fixed ranks, forked processes, heartbeats and our own escalation.

One per node. It outlives its ranks: it names the first failure, restarts within the budget, relays stop requests.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from trainer.autopsy import Autopsy
from trainer.config import Job
from trainer.entry import run_rank
from trainer.errors import STOPPED
from trainer.heartbeat import Heartbeat
from trainer.postmortem import Failure
from trainer.record import record_event
from trainer.rendezvous import Ended, NodeRendezvous, PeerLost
from trainer.stop import FLAG
from trainer.tail import Tail
from trainer.wiring import Wiring

logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # we say ourselves what happens

POLL_S = 0.1
BEAT_S = 1.0
PEER_TIMEOUT_S = 15.0
"""Seconds without a beat of another agent until its node counts as lost."""


class NodeAgent(LocalElasticAgent):
    """Supervises the ranks of one node."""

    def __init__(
        self, job: Job, job_file: Path, run: Path, wiring: Wiring, rendezvous: NodeRendezvous, threads: int,
        heartbeat_file: Path, rank_environment: dict[str, str],
    ) -> None:  # fmt: skip
        """`rank_environment`: what each rank gets besides torchrun's variables."""
        logs = run / "logs"
        spec = WorkerSpec(
            role="default",
            local_world_size=job.ranks_per_node,
            entrypoint=run_rank,
            args=(job, str(run), str(job_file), threads, str(logs)),
            rdzv_handler=rendezvous,
            max_restarts=job.agent.restarts,
        )
        super().__init__(spec, DefaultLogsSpecs(), start_method="forkserver")
        self.job, self.run_folder, self.wiring, self.rendezvous = job, run, wiring, rendezvous
        self.heartbeat = Heartbeat(heartbeat_file, job.ranks_per_node)
        self.rank_environment = rank_environment
        self.tail = Tail(logs / "rank-0.log") if wiring.node_rank == 0 else None
        self.autopsy = Autopsy(job, run, wiring, self.heartbeat)
        self.beats: dict[int, tuple[int, float]] = {}
        self.next_beat = 0.0
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
        self.autopsy.attempt = self.rendezvous.plan["attempt"]
        self.beats.clear()
        for local_rank in range(self.job.ranks_per_node):
            self.heartbeat.clear(local_rank)
        self.spawned = time.monotonic()
        pids = super()._start_workers(worker_group)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, FLAG._handle)  # torch has just replaced ours by one that raises anywhere
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
        self._kill()
        super()._shutdown(signal.SIGKILL, timeout=10)
        self._pcontext = None

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._stop_workers(self._worker_group)

    def _processes(self) -> list[Any]:
        context: Any = self._pcontext
        return list(context._pc.processes) if context is not None and context._pc is not None else []

    def _kill(self) -> None:
        for process in self._processes():
            if process.exitcode is None:
                process.kill()
                # A stopped process dies of SIGKILL too; one in uninterruptible sleep is abandoned by the bound above.

    def _invoke_run(self, role: str = "default") -> RunResult:
        """Rounds of rendezvous, start and watch, until the ranks are done or the agents agree to end."""
        group = self._worker_group
        while True:
            self._initialize_workers(group)
            result, failure = self._watch(group)
            if result is not None:
                if self._others_done():
                    return result
                continue  # another node failed meanwhile: its ranks need ours to finish
            self.rendezvous.failure = failure.to_json() if failure else None
            self._stop_workers(group)

    def _watch(self, group: WorkerGroup) -> tuple[RunResult | None, Failure | None]:
        """Wait until all ranks are done, or something failed here (a failure) or elsewhere (none)."""
        sentinels = [process.sentinel for process in self._processes()]
        while True:
            connection.wait(sentinels, POLL_S)
            if self.tail is not None:
                self.tail.copy()
            dead = [index for index, p in enumerate(self._processes()) if p.exitcode not in (None, 0)]
            if dead:
                return self._died(dead)
            result = self._monitor_workers(group)
            if result.state == WorkerState.SUCCEEDED:
                if self.tail is not None:
                    self.tail.copy()
                return result, None
            failure = self._relay_stop() or self.autopsy.find_hung(self._processes(), self.spawned)
            if failure is not None:
                return None, failure
            try:
                if self._peer_news():
                    return None, None
            except (PeerLost, DistError) as error:
                return None, self.autopsy.peer(0, str(error))
            lost = self._silent_peer()
            if lost is not None:
                return None, self.autopsy.peer(lost, f"no beat of its agent for {PEER_TIMEOUT_S:.0f} s")

    def _died(self, dead: list[int]) -> tuple[RunResult | None, Failure | None]:
        """Some rank ended badly: wait a moment for the first cause to show, then describe it."""
        processes = self._processes()
        if self.asked is not None or FLAG.requested:  # a stop request: no failure but an end
            end = time.monotonic() + 1
            while time.monotonic() < end and any(p.exitcode is None for p in processes):
                time.sleep(0.02)
            codes = [processes[index].exitcode for index in dead]
            if all(code < 0 for code in codes):
                raise Ended("stopped on request; ranks had not begun to train or were ended", STOPPED)
        return None, self.autopsy.describe(processes, self._worker_group)

    def _relay_stop(self) -> Failure | None:
        """Pass a stop request on to the ranks once; enforce the grace period."""
        now = time.monotonic()
        if self.asked is None:
            if FLAG.requested is None and not (now >= self.next_beat and self.rendezvous.stop_wanted()):
                return None
            self.asked = now
            for process in self._processes():
                if process.exitcode is None:
                    os.kill(process.pid, signal.SIGTERM)
        if now - self.asked > self.job.agent.grace_s:
            self._stop_workers(self._worker_group)
            raise Ended(
                f"stopped on request, but the ranks did not finish a step and a save within agent.grace_s="
                f"{self.job.agent.grace_s:.0f} s; the previous checkpoint stands", STOPPED,
            )  # fmt: skip
        return None

    def _peer_news(self) -> bool:
        """Whether another agent wants a new round; looked up at most every poll."""
        return self.rendezvous.num_nodes_waiting() > 0

    def _silent_peer(self) -> int | None:
        """A node whose agent has stopped beating."""
        now = time.monotonic()
        if self.wiring.nodes == 1 or now < self.next_beat:
            return None
        self.next_beat = now + BEAT_S
        try:
            counts = self.rendezvous.beat()
        except DistError:
            return 0
        for node, count in counts.items():
            before = self.beats.get(node)
            if before is None or before[0] != count:
                self.beats[node] = count, now
            elif now - before[1] > PEER_TIMEOUT_S:
                return node
        return None

    def _others_done(self) -> bool:
        """Wait until every node's ranks are done; False when one asks for another round instead."""
        if self.wiring.nodes == 1 or self.rendezvous.store is None:
            return True
        store, key = self.rendezvous.store, f"muster/{self.rendezvous.round}/done"
        try:
            store.set(f"{key}/{self.wiring.node_rank}", "1")
            end = time.monotonic() + self.job.agent.rejoin_timeout_s
            while not store.check([f"{key}/{node}" for node in range(self.wiring.nodes)]):
                if self._peer_news():
                    return False
                if time.monotonic() > end or self._silent_peer() is not None:
                    break
                time.sleep(0.02)
            store.add(f"{key}/seen", 1)
            while self.wiring.node_rank == 0 and int(store.add(f"{key}/seen", 0)) < self.wiring.nodes:
                if time.monotonic() > end:
                    break
                time.sleep(0.01)  # the others still read from this agent's store
        except (DistError, PeerLost):
            pass  # they are done and gone
        return True

    def _exit_barrier(self) -> None:
        """Replaced by `_others_done`."""


def supervise(agent: NodeAgent, say: Callable[[str], None]) -> tuple[int, str | None]:
    """Run the agent to its end; return the exit code and, after a failure, its reason."""
    try:
        result = agent.run()
    except Ended as end:
        return end.code, str(end)
    except RendezvousTimeoutError as error:
        return 1, f"peer lost: {error}"
    except OSError as error:
        return 1, str(error)
    codes = {int(value) for value in result.return_values.values()}
    return max(codes, default=1), None
