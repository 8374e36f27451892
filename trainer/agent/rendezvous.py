"""Where the agents of a job meet, in their places by node rank, after each has proven to belong to the job.

Node 0 serves what the agents share, at the address that its name means, on the first candidate port that it can bind.
The others try the same ports and pass by who cannot prove to know the run's secret. The ranks of each round get a store
of their own: from a shared one, restarted ranks would read the addresses of a dead attempt (with c10d's, 4 restarts of
22 recovered). It listens where the other agents came to, and they alone are told its port.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from trainer.agent.awake_clock import CLOCK
from trainer.agent.failure import Failure
from trainer.agent.first_contact import find_store, serve_store
from trainer.agent.kv_client import KeyValueClient
from trainer.agent.kv_server import KeyValueServer
from trainer.agent.kv_store import PeerLost
from trainer.agent.proof import Membership
from trainer.agent.rank_store import RankStore
from trainer.agent.rounds import (
    VERSIONS,
    Ended,
    RendezvousTimeoutError,
    Round,
    Wishes,
    check_versions,
    make_end,
    make_report,
    read_end,
    read_failures,
)
from trainer.errors import FAILED, STOPPED, some_of
from trainer.wiring.node import Wiring

LOOK_S = 0.1  # between two looks for a stop request, which wakes nobody
WIDEN_S = 30.0  # without all nodes: maybe they know node 0 by another address than it does itself
NAMED = 8  # of the nodes that are missing


class NodeRendezvous:
    """One node's side of the meetings."""

    def __init__(
        self, wiring: Wiring, secret: bytes, first_s: float, rejoin_s: float, interrupted: Callable[[], bool],
        next_attempt: Callable[[int, list[Failure]], int], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`secret`: of the run.

        `first_s`, `rejoin_s`: how long to wait for all nodes the first time, and after a failure.
        `next_attempt(round, failures)` is asked on node 0; it returns a number, or raises `Ended`.
        """
        self.wiring, self.bound_s, self.rejoin_s, self.next_attempt = wiring, first_s, rejoin_s, next_attempt
        self.interrupted, self.say = interrupted, say
        self.round = 0
        self.failure: Failure | None = None  # what this node will report in the next round
        self.versions = VERSIONS
        self.membership = Membership(f"{wiring.job_id}/{wiring.launch}", secret)
        self.store: KeyValueServer | KeyValueClient | None = None
        self.rank_store: RankStore | None = None
        self.is_local = wiring.is_one_machine
        self.done, self.next_progress, self.widen_at = 0, 0.0, 0.0
        # Kubernetes asks each pod for itself, and replaces it: the others wait, instead of leaving with it.
        self.alone = wiring.platform == "kubernetes" and wiring.nodes > 1
        self.in_vain = FAILED  # the exit code when a node does not come

    def next_round(self) -> Round:
        """Meet all nodes. Raises Ended: the job ends. Raises RendezvousTimeoutError: some node did not come in time."""
        deadline = CLOCK.now() + self.bound_s
        self.next_progress = CLOCK.now() + 5
        while True:
            try:
                agreed = self._meet(deadline)
                self.bound_s, self.failure = self.rejoin_s, None
                self.in_vain = STOPPED if self.alone else FAILED  # nothing is wrong with how the nodes reach each other
                return agreed
            except PeerLost as error:  # of node 0, which may be replaced
                end = self._drop_store()
                if end:
                    raise read_end(end) from None
                text = f"node {self.wiring.node_rank}: {error}"
                self._pause(False, deadline, partial(str, "node 0:"), partial(str, text))

    def _meet(self, deadline: float) -> Round:
        store = self.store = self.store or self._open_store(deadline)
        if self.round == 0:  # this agent is new here, and the others may be in a later round already
            [plan] = store.get("plan")
            self.round = plan["round"] if plan else 0
            if self.round:  # the end of its predecessor is what ended that round
                store.add(f"{self.round + 1}/wishes", "cause_known")
        if self.interrupted():
            if self.alone:
                raise self._stopped()
            store.set("stop", True)
        self._report(self.failure)
        self.round += 1
        try:
            if isinstance(store, KeyValueServer):
                self._plan(store, deadline)
            self._await(deadline, lambda: self._planned() == self.round, lambda: [0])
        except (Ended, RendezvousTimeoutError) as error:  # the others are here, or on their way
            if self.alone and self.interrupted():
                store.tell(f"{self.round}/report", None)  # or they would start ranks that wait for ours
            elif store.get("end") == [None]:
                end = error if isinstance(error, Ended) else Ended(f"peer lost: {error}", self.in_vain)
                store.set("end", make_end(str(end), end.code))
            raise
        [plan] = store.get("plan")
        return Round(self.round, plan["attempt"], self.master_addr(), plan["master_port"])

    def _planned(self) -> int:
        """The number of the newest round that node 0 has planned."""
        [plan] = self._store().get("plan")
        return plan["round"] if plan else 0

    def _plan(self, store: KeyValueServer, deadline: float) -> None:
        """On node 0: hear all nodes, and decide."""
        key = f"{self.round}/report"
        self._await(
            deadline,
            lambda: store.get(key) == [True] and None not in store.told[key].values(),  # None: it has left again
            lambda: [node for node in range(self.wiring.nodes) if store.told.get(key, {}).get(node) is None],
        )
        reports = [store.told[key][node] for node in range(self.wiring.nodes)]
        check_versions([report.get("versions") if isinstance(report, dict) else None for report in reports])
        attempt = self.next_attempt(self.round, read_failures(reports))
        if self.rank_store is not None:
            self.rank_store.close()
        address = "127.0.0.1" if self.is_local else store.reached()
        try:
            self.rank_store = RankStore(address)
        except (EOFError, ConnectionError):  # the fork server is gone; multiprocessing starts another
            self.rank_store = RankStore(address)
        store.forget(self.round)
        store.set("plan", {"round": self.round, "attempt": attempt, "master_port": self.rank_store.port})

    def _report(self, failure: Failure | None) -> None:
        """Tell what ended the ranks here, for the next round."""
        self._store().tell(f"{self.round + 1}/report", make_report(self.versions, failure))
        self.alarm(failure)

    def _store(self) -> KeyValueServer | KeyValueClient:
        assert self.store is not None, "the agents have not met"
        return self.store

    def _drop_store(self) -> object:
        """Part from a node 0 that does not answer any more; return what it said of the end of the job."""
        [end] = self._store().get("end") if self.store else [None]
        if self.store is not None:
            self.store.close()
        self.store, self.round, self.done = None, 0, 0
        return end

    def _await(self, deadline: float, ready: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
        """Wait for other nodes, noticing stop requests, the end of the job and a bound."""

        def who() -> str:
            return "node " + some_of([f"{node} ({self.wiring.hostnames[node]})" for node in missing()], NAMED)

        while True:
            stop, end = self._store().get("stop", "end")
            if end:
                raise read_end(end)
            if not stop and not self.interrupted() and ready():
                return
            self._store().check()
            self._pause(
                bool(stop), deadline, lambda: f"{who()}:", lambda: f"{who()} did not come within {self.bound_s:.0f} s"
            )

    def _pause(
        self, stop: bool, deadline: float, waiting_for: Callable[[], str], timeout: Callable[[], str],
        pause_s: float = LOOK_S,
    ) -> None:  # fmt: skip
        """Between two tries: notice a stop request and the bound, and show progress."""
        if stop or self.interrupted():
            raise self._stopped()
        now = CLOCK.now()
        if now > deadline:
            raise RendezvousTimeoutError(timeout())
        if now > self.next_progress:
            self.say(f"waiting for {waiting_for()} {deadline - now:.0f} s left")
            self.next_progress = now + 10
        if now > self.widen_at and isinstance(self.store, KeyValueServer) and not self.is_local:
            self.widen_at = float("inf")
            with contextlib.suppress(OSError):
                self.store.listen([""], self.wiring.ports)
                self.say("the agents listen on all interfaces now: others may know this host by another address")
        if self.store is not None:
            self.store.wait(pause_s)
        else:
            time.sleep(pause_s)

    def _stopped(self) -> Ended:
        met = self.in_vain == STOPPED
        when = "while other nodes were waited for; the last checkpoint stands" if met else "before the ranks started"
        return Ended(f"stopped on request {when}", STOPPED)

    def master_addr(self) -> str:
        """Where the ranks find their store: the address that was reached, because the name may lead elsewhere by now.

        A host that was replaced under its name, as a pod is, has a new address; resolvers remember the old one a while.
        """
        store = self._store()
        return store.address if isinstance(store, KeyValueClient) else store.reached() or "127.0.0.1"

    def _open_store(self, deadline: float) -> KeyValueServer | KeyValueClient:
        if self.wiring.node_rank:

            def pause(problem: str, pause_s: float) -> None:
                name, node = self.wiring.master_addr, self.wiring.node_rank
                timeout = f"node {node} found no master at {name} within {self.bound_s:.0f} s: {problem}"
                waiting_for = partial(str, f"the master {name}: {problem};")
                self._pause(False, deadline, waiting_for, partial(str, timeout), pause_s)

            return find_store(self.wiring, self.membership, pause)
        self.widen_at = CLOCK.now() + WIDEN_S
        return serve_store(self.wiring, self.membership, self.say)

    def wakes(self) -> int:
        """A file that can be read when there is something new to `look` at."""
        return self._store().wakes

    def wait(self, timeout_s: float) -> None:
        """Wait for something new."""
        self._store().wait(timeout_s)

    def look(self) -> Wishes:
        """What the other agents want by now. Raises PeerLost: node 0 does not answer, as do the methods that follow."""
        store = self._store()
        store.clear()
        store.check()
        stop, found = store.get("stop", f"{self.round + 1}/wishes")
        words = found or ()
        return Wishes(bool(stop) or "stop" in words, *(word in words for word in ("next_round", "hung", "cause_known")))

    def alarm(self, failure: Failure | None) -> None:
        """Ask the others for a round and let them know why, as soon as it is noticed; the report may know more."""
        hung = failure is not None and failure.kind == "hung"
        cause_known = failure is not None and not failure.is_consequence
        wishes = asdict(Wishes(next_round=True, hung=hung, cause_known=cause_known))
        self._store().add(f"{self.round + 1}/wishes", *(word for word, wished in wishes.items() if wished))

    def compare(self, failure: Failure, wait_s: float) -> None:
        """Report a failure before the ranks here are ended, and let the others look at theirs."""
        self._report(failure)
        end = time.monotonic() + wait_s
        while self._store().get(f"{self.round + 1}/report") != [True] and (left := end - time.monotonic()) > 0:
            self._store().wait(min(left, LOOK_S))
            self._store().check()

    def stop_all(self) -> None:
        """Make the other agents stop their ranks too: for good, or in this round where they stay."""
        if self.alone:
            self._store().add(f"{self.round + 1}/wishes", "stop")
        else:
            self._store().set("stop", True)

    def end_all(self, reason: str, code: int) -> None:
        """Let the other agents end as this one does: its `reason` is more than what they would see of it."""
        with contextlib.suppress(PeerLost):
            if self.store is not None:
                self.store.set("end", make_end(reason, code))
                self.store.add(f"{self.round + 1}/wishes", "next_round", "cause_known")

    def all_done(self) -> bool:
        """Whether the ranks of every node are done in this round; tells the others that those of this node are."""
        key, store = f"{self.round}/done", self._store()
        if self.done != self.round:
            store.tell(key)
            self.done = self.round
        store.check()
        return store.get(key) == [True]

    def lost_peer(self) -> tuple[int, str] | None:
        """A node whose agent is gone, as far as this one can tell, and how that shows."""
        return self._store().lost()

    def shutdown(self) -> None:
        """Leave the others; node 0 waits a moment for them to read why."""
        for store in (self.store, self.rank_store):
            if store is not None:
                store.close()
        self.store = self.rank_store = None
