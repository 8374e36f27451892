"""Where the agents of a job meet, in their places by node rank, after each has proven to belong to the job.

Node 0 serves the agents' key-value store on the first candidate port that it can bind. The others try the same ports
and accept a store only if it greets them as one of this job. The ranks of each round get a store of their own: from a
shared one, restarted ranks would read the addresses of a dead attempt (with c10d's, 4 restarts of 22 recovered).
What a round is, and what the agents tell each other in it: `trainer.agent.rounds`.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from trainer import __version__
from trainer.agent.failure import Failure
from trainer.agent.kv_store import KeyValueClient, KeyValueServer, PeerLost
from trainer.agent.rank_store import RankStore
from trainer.agent.rounds import Ended, NodeReport, RendezvousTimeoutError, Round, RoundPlan, Wishes, check_versions
from trainer.errors import FAILED, STOPPED
from trainer.wiring.network import own_address
from trainer.wiring.node import Wiring

VERSIONS = {"muster": __version__, "torch": version("torch")}
"""Of what must be the same on all nodes, or ranks compute different things."""
POLLS_PER_S = 4000
"""What node 0 can answer with a fraction of a core: the more nodes there are, the more rarely each of them asks."""


class NodeRendezvous:
    """One node's side of the meetings."""

    def __init__(
        self, wiring: Wiring, first_s: float, rejoin_s: float, interrupted: Callable[[], bool],
        next_attempt: Callable[[int, list[Failure]], int], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`first_s`, `rejoin_s`: how long to wait for all nodes the first time, and after a failure.

        `next_attempt(round, failures)` is asked on node 0; it returns a number, or raises `Ended`.
        """
        self.wiring, self.bound_s, self.rejoin_s, self.next_attempt = wiring, first_s, rejoin_s, next_attempt
        self.interrupted, self.say = interrupted, say
        self.round = self.reported = self.done = 0
        self.failure: Failure | None = None
        """What this node will report in the next round."""
        self.versions = VERSIONS
        self.identity = f"{wiring.job_id}/{wiring.launch}"
        self.store: KeyValueServer | KeyValueClient | None = None
        self.rank_store: RankStore | None = None
        # With one node, or all nodes on one machine, nobody else has any business here.
        self.address = "127.0.0.1" if wiring.nodes == 1 or wiring.platform == "local" else ""
        self.pause_s = max(0.01, wiring.nodes / POLLS_PER_S)
        self.wishes, self.next_look, self.next_progress = Wishes(), 0.0, 0.0

    def next_round(self) -> Round:
        """Meet all nodes.

        Raises:
            RendezvousTimeoutError: some node did not come within its bound.
            Ended: the job ends.
        """
        deadline = time.monotonic() + self.bound_s
        self.next_progress = time.monotonic() + 5
        while True:
            try:
                plan = self._meet(deadline)
                self.bound_s, self.failure, self.wishes, self.next_look = self.rejoin_s, None, Wishes(), 0.0
                return Round(self.round, plan.attempt, self.master_addr(), plan.master_port)
            except PeerLost as error:  # of node 0, which may be replaced
                self.store, self.round, self.reported, self.done = None, 0, 0, 0
                if time.monotonic() > deadline:
                    raise RendezvousTimeoutError(f"node {self.wiring.node_rank}: {error}") from None
                time.sleep(0.05)

    def _meet(self, deadline: float) -> RoundPlan:
        store = self.store = self.store or (self._host() if self.wiring.node_rank == 0 else self._find(deadline))
        if self.round == 0:  # this agent is new here, and the others may be in a later round already
            self.round = store.add("round", 0)
            if self.round:  # the end of its predecessor is what ended that round
                store.set(f"{self.round + 1}/cause", True)
        self.round += 1
        if self.interrupted():
            store.set("stop", True)
        self._report(self.round, self.failure)
        if isinstance(store, KeyValueServer):
            try:
                store.set(f"{self.round}/plan", self._plan(deadline).to_json())
            except Ended as end:
                store.set("end", [str(end), end.code])
                raise
        return RoundPlan.from_json(self._wait([f"{self.round}/plan"], deadline)[0])

    def _plan(self, deadline: float) -> RoundPlan:
        """On node 0: hear all nodes, and decide."""
        values = self._wait([f"{self.round}/report/{node}" for node in range(self.wiring.nodes)], deadline)
        reports = [NodeReport.from_json(value) for value in values]
        check_versions(reports)
        attempt = self.next_attempt(self.round, [report.failure for report in reports if report.failure])
        plan = RoundPlan(attempt, self._host_ranks())
        self._store().add("round", 1)
        return plan

    def _report(self, number: int, failure: Failure | None) -> None:
        store, node = self._store(), self.wiring.node_rank
        store.set(f"{number}/report/{node}", NodeReport(self.versions, failure).to_json())
        store.add(f"{number}/reports", int(self.reported != number))
        self.reported = number
        self._wish(number, failure)

    def _wish(self, number: int, failure: Failure | None) -> None:
        """Ask the others for a round, and let them know why."""
        if failure is not None and failure.kind == "hung":
            self._store().set(f"{number}/hung", True)
        if failure is not None and not failure.is_consequence:
            self._store().set(f"{number}/cause", True)
        self._store().set(f"{number}/wanted", True)

    def _store(self) -> KeyValueServer | KeyValueClient:
        assert self.store is not None, "the agents have not met"
        return self.store

    def _wait(self, keys: list[str], deadline: float) -> list[Any]:
        """Wait for values, noticing stop requests, the end of the job and a bound."""
        store = self._store()
        while True:
            stop, end, *values = store.get("stop", "end", *keys)
            if end:
                raise Ended(*end)
            if not stop and None not in values and not self.interrupted():
                return values
            missing = [key.rpartition("/")[2] for key, value in zip(keys, values, strict=True) if value is None]
            who = ", ".join(f"{node} ({self.wiring.hostnames[int(node)]})" for node in missing if node.isdigit()) or "0"
            try:
                self._pause(
                    bool(stop), deadline, f"node {who}:", f"node {who} did not come within {self.bound_s:.0f} s"
                )
            except Ended:
                store.set("stop", True)
                raise
            except RendezvousTimeoutError as error:
                store.set("end", [f"peer lost: {error}", FAILED])
                raise

    def _pause(self, stop: bool, deadline: float, waiting_for: str, timeout: str) -> None:
        """Between two tries: notice a stop request and the bound, and show progress."""
        if stop or self.interrupted():
            raise Ended("stopped on request before the ranks started", STOPPED)
        now = time.monotonic()
        if now > deadline:
            raise RendezvousTimeoutError(timeout)
        if now > self.next_progress:
            self.say(f"waiting for {waiting_for} {deadline - now:.0f} s left")
            self.next_progress = now + 10
        time.sleep(self.pause_s)

    def _host(self) -> KeyValueServer:
        server = KeyValueServer(self.identity, self.wiring.nodes)
        if self.wiring.nodes > 1:
            server.listen(self.address, self.wiring.ports)
        return server

    def _host_ranks(self) -> int:
        """Make the store where the ranks of this round find each other, and return its port. It outlives rank 0."""
        if self.rank_store is not None:
            self.rank_store.close()
        self.rank_store = RankStore(self.address)
        return self.rank_store.port

    def master_addr(self) -> str:
        """Where the ranks find their store: the address that was reached, because the name may lead elsewhere by now.

        A host that was replaced under its name, as a pod is, has a new address; resolvers remember the old one a while.
        """
        if isinstance(self.store, KeyValueClient):
            return self.store.address
        return "127.0.0.1" if self.wiring.nodes == 1 else own_address(self.wiring.master_addr)

    def _find(self, deadline: float) -> KeyValueClient:
        """Connect to node 0, whose name is looked up anew at every try."""
        ports = deque(self.wiring.ports)
        name, node = self.wiring.master_addr, self.wiring.node_rank
        while True:
            problem = "nobody listens"
            for tried, port in enumerate(list(ports), 1):
                try:
                    return KeyValueClient(name, port, self.identity, node)
                except ConnectionRefusedError:
                    continue
                except socket.gaierror as error:
                    problem = f"the name does not resolve: {error.strerror}"
                    break
                except TimeoutError:  # a host that is gone, or a foreign listener: again from the next candidate on
                    problem = "no answer"
                    ports.rotate(-tried)
                    break
                except OSError as error:
                    problem = str(error)
            timeout = f"node {node} found no master at {name} within {self.bound_s:.0f} s: {problem}"
            self._pause(False, deadline, f"the master {name}: {problem};", timeout)

    def look(self) -> Wishes:
        """What the other agents want by now.

        Raises:
            PeerLost: node 0 does not answer.
        """
        if self.store is not None and self.wiring.nodes > 1 and time.monotonic() > self.next_look:
            number = self.round + 1
            keys = ("stop", f"{number}/wanted", f"{number}/hung", f"{number}/cause")
            self.wishes = Wishes(*map(bool, self.store.get(*keys)))
            self.next_look = time.monotonic() + (self.pause_s if self.pause_s > 0.01 else 0)
        return self.wishes

    def alarm(self, failure: Failure) -> None:
        """Tell the others of a failure as soon as it is noticed; the next round's report may know more.

        Raises:
            PeerLost: node 0 does not answer.
        """
        if self.store is not None and self.wiring.nodes > 1:
            self._wish(self.round + 1, failure)

    def compare(self, failure: Failure, wait_s: float) -> None:
        """Report a failure before the ranks here are ended, and let the others look at theirs.

        Raises:
            PeerLost: node 0 does not answer.
        """
        if self.store is None or self.wiring.nodes == 1:
            return
        self._report(self.round + 1, failure)
        end = time.monotonic() + wait_s
        while self.store.add(f"{self.round + 1}/reports", 0) < self.wiring.nodes and time.monotonic() < end:
            time.sleep(2 * self.pause_s)

    def stop_all(self) -> None:
        """Make the other agents stop their ranks too.

        Raises:
            PeerLost: node 0 does not answer.
        """
        if self.store is not None:
            self.store.set("stop", True)

    def lost_peer(self) -> tuple[int, str] | None:
        """A node whose agent is gone, as far as this one can tell, and how that shows."""
        return self.store.lost() if self.store is not None else None

    def all_done(self) -> bool:
        """Whether the ranks of every node are done in this round; tells the others that those of this node are.

        Raises:
            PeerLost: node 0 does not answer.
        """
        if self.store is None or self.wiring.nodes == 1:
            return True
        count = self.store.add(f"{self.round}/done", int(self.done != self.round))
        self.done = self.round
        return count >= self.wiring.nodes

    def shutdown(self) -> None:
        """Leave the others; node 0 waits a moment for them to read why."""
        if self.store is not None:
            self.store.close()
        if self.rank_store is not None:
            self.rank_store.close()
        self.store = self.rank_store = None
