"""Where the agents of a job meet, in their places by node rank, after each has proven to belong to the job.

Node 0 serves the agents' key-value store on the first candidate port that it can bind. The others try the same ports
and accept a store only if it greets them as one of this job. The ranks of each round get a store of their own: from a
shared one, restarted ranks would read the addresses of a dead attempt (with c10d's, 4 restarts of 22 recovered).
"""

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from trainer.agent.awake_clock import CLOCK
from trainer.agent.failure import Failure
from trainer.agent.kv_store import KeyValueClient, KeyValueServer, PeerLost
from trainer.agent.rank_store import RankStore
from trainer.agent.rounds import VERSIONS, Ended, RendezvousTimeoutError, Round, Wishes, check_versions
from trainer.errors import FAILED, STOPPED
from trainer.wiring.network import own_address
from trainer.wiring.node import Wiring

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
        self.round = 0
        self.failure: Failure | None = None  # what this node will report in the next round
        self.versions = VERSIONS
        self.identity = f"{wiring.job_id}/{wiring.launch}"
        self.store: KeyValueServer | KeyValueClient | None = None
        self.rank_store: RankStore | None = None
        # With one node, or all nodes on one machine, nobody else has any business here.
        self.address = "127.0.0.1" if wiring.nodes == 1 or wiring.platform == "local" else ""
        self.pause_s = max(0.01, wiring.nodes / POLLS_PER_S)
        self.wishes, self.next_look, self.next_progress = Wishes(), 0.0, 0.0

    def next_round(self) -> Round:
        """Meet all nodes. Raises Ended: the job ends. Raises RendezvousTimeoutError: some node did not come in time."""
        deadline = CLOCK.now() + self.bound_s
        self.next_progress = CLOCK.now() + 5
        while True:
            try:
                agreed = self._meet(deadline)
                self.bound_s, self.failure, self.next_look = self.rejoin_s, None, 0.0
                return agreed
            except PeerLost as error:  # of node 0, which may be replaced
                self.store, self.round = None, 0
                self._pause(False, deadline, "node 0:", f"node {self.wiring.node_rank}: {error}")

    def _meet(self, deadline: float) -> Round:
        store = self.store = self.store or self._open_store(deadline)
        if self.round == 0:  # this agent is new here, and the others may be in a later round already
            self.round = store.get("round")[0] or 0
            if self.round:  # the end of its predecessor is what ended that round
                store.join(f"{self.round + 1}/wishes", "cause_known")
        if self.interrupted():
            store.set("stop", True)
        self._report(self.failure)
        self.round += 1
        try:
            if self.wiring.node_rank == 0:
                self._plan(deadline)
            [plan] = self._wait([f"{self.round}/plan"], deadline)
        except (Ended, RendezvousTimeoutError) as error:  # the others are here, or on their way
            store.set("end", [str(error), error.code] if isinstance(error, Ended) else [f"peer lost: {error}", FAILED])
            raise
        return Round(self.round, plan["attempt"], self.master_addr(), plan["master_port"])

    def _plan(self, deadline: float) -> None:
        """On node 0: hear all nodes, and decide."""
        reports = self._wait([f"{self.round}/report/{node}" for node in range(self.wiring.nodes)], deadline)
        check_versions([report["versions"] for report in reports])
        failures = [Failure(**report["failure"]) for report in reports if report["failure"]]
        attempt = self.next_attempt(self.round, failures)
        if self.rank_store is not None:
            self.rank_store.close()
        try:
            self.rank_store = RankStore(self.address)
        except (EOFError, ConnectionError):  # the fork server is gone; multiprocessing starts another
            self.rank_store = RankStore(self.address)
        self._store().set("round", self.round)
        self._store().set(f"{self.round}/plan", {"attempt": attempt, "master_port": self.rank_store.port})

    def _report(self, failure: Failure | None) -> None:
        """Tell what ended the ranks here, for the next round."""
        store, number, node = self._store(), self.round + 1, self.wiring.node_rank
        report = {"versions": self.versions, "failure": asdict(failure) if failure else None}
        store.set(f"{number}/report/{node}", report)
        store.join(f"{number}/reports", str(node))
        self.alarm(failure)

    def _store(self) -> KeyValueServer | KeyValueClient:
        assert self.store is not None, "the agents have not met"
        return self.store

    def _wait(self, keys: list[str], deadline: float) -> list[Any]:
        """Wait for a value of each of the first nodes, noticing stop requests, the end of the job and a bound."""
        while True:
            stop, end, *values = self._store().get("stop", "end", *keys)
            if end:
                raise Ended(*end)
            if not stop and None not in values and not self.interrupted():
                return values
            missing = [node for node, value in enumerate(values) if value is None]
            who = "node " + ", ".join(f"{node} ({self.wiring.hostnames[node]})" for node in missing)
            self._pause(bool(stop), deadline, f"{who}:", f"{who} did not come within {self.bound_s:.0f} s")

    def _pause(self, stop: bool, deadline: float, waiting_for: str, timeout: str) -> None:
        """Between two tries: notice a stop request and the bound, and show progress."""
        if stop or self.interrupted():
            raise Ended("stopped on request before the ranks started", STOPPED)
        now = CLOCK.now()
        if now > deadline:
            raise RendezvousTimeoutError(timeout)
        if now > self.next_progress:
            self.say(f"waiting for {waiting_for} {deadline - now:.0f} s left")
            self.next_progress = now + 10
        time.sleep(self.pause_s)

    def master_addr(self) -> str:
        """Where the ranks find their store: the address that was reached, because the name may lead elsewhere by now.

        A host that was replaced under its name, as a pod is, has a new address; resolvers remember the old one a while.
        """
        if isinstance(self.store, KeyValueClient):
            return self.store.address
        return "127.0.0.1" if self.wiring.nodes == 1 else own_address(self.wiring.master_addr)

    def _open_store(self, deadline: float) -> KeyValueServer | KeyValueClient:
        """Serve it on node 0, and connect to it elsewhere; the name of node 0 is looked up anew at every try."""
        name, node, ports = self.wiring.master_addr, self.wiring.node_rank, deque(self.wiring.ports)
        if node == 0:
            server = KeyValueServer(self.identity, self.wiring.nodes)
            if self.wiring.nodes > 1:
                server.listen(self.address, ports)
            return server
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
        """What the other agents want by now. Raises PeerLost: node 0 does not answer, as do the methods that follow."""
        if time.monotonic() > self.next_look:
            stop, words = self._store().get("stop", f"{self.round + 1}/wishes")
            self.wishes = Wishes(bool(stop), *(word in (words or ()) for word in ("next_round", "hung", "cause_known")))
            self.next_look = time.monotonic() + (self.pause_s if self.pause_s > 0.01 else 0)
        return self.wishes

    def alarm(self, failure: Failure | None) -> None:
        """Ask the others for a round and let them know why, as soon as it is noticed; the report may know more."""
        hung = failure is not None and failure.kind == "hung"
        cause_known = failure is not None and not failure.is_consequence
        wishes = asdict(Wishes(next_round=True, hung=hung, cause_known=cause_known))
        self._store().join(f"{self.round + 1}/wishes", *(word for word, wished in wishes.items() if wished))

    def compare(self, failure: Failure, wait_s: float) -> None:
        """Report a failure before the ranks here are ended, and let the others look at theirs."""
        self._report(failure)
        end = time.monotonic() + wait_s
        while not self._all_have(f"{self.round + 1}/reports") and time.monotonic() < end:
            time.sleep(2 * self.pause_s)

    def stop_all(self) -> None:
        """Make the other agents stop their ranks too."""
        self._store().set("stop", True)

    def end_all(self, reason: str, code: int) -> None:
        """Let the other agents end as this one does: its `reason` is more than what they would see of it."""
        with contextlib.suppress(PeerLost):
            if self.store is not None:
                self.store.set("end", [reason, code])
                self.store.join(f"{self.round + 1}/wishes", "next_round", "cause_known")

    def all_done(self) -> bool:
        """Whether the ranks of every node are done in this round; tells the others that those of this node are."""
        return self._all_have(f"{self.round}/done")

    def _all_have(self, key: str) -> bool:
        """Whether every node has joined a set; this one does so now."""
        return self._store().join(key, str(self.wiring.node_rank)) >= self.wiring.nodes

    def lost_peer(self) -> tuple[int, str] | None:
        """A node whose agent is gone, as far as this one can tell, and how that shows."""
        return self._store().lost()

    def shutdown(self) -> None:
        """Leave the others; node 0 waits a moment for them to read why."""
        for store in (self.store, self.rank_store):
            if store is not None:
                store.close()
        self.store = self.rank_store = None
