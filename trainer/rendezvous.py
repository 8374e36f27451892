"""Where agents meet: torch's extension point for it, with fixed node ranks and an identity that is checked.

Node 0 hosts the agents' store on the first candidate port that it can bind; the others try the same ports and
accept a store only when it tells the same job. Each round has a store of its own for the ranks, so a restarted
rank never reads the addresses of a dead attempt (facts: c10d's shared store recovers 4 times of 22).
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from trainer.wiring import Wiring

IDENTITY = "muster/identity"
STORE_TIMEOUT = timedelta(seconds=10)
"""Of one operation on the agents' store: longer means that the master or the way to it is gone."""


class PeerLost(RuntimeError):
    """Another node did not answer, or did not come back, within its bound."""


class Ended(RuntimeError):
    """The agents agreed that the job ends; the message is the reason, `code` the exit code."""

    def __init__(self, reason: str, code: int) -> None:
        """Keep both."""
        super().__init__(reason)
        self.code = code


class NodeRendezvous(RendezvousHandler):
    """Meets the other agents of the job in rounds; a round ends when any agent asks for the next."""

    def __init__(
        self, wiring: Wiring, rejoin_timeout_s: float, start_round: Callable[[int, list[Any]], dict[str, Any]],
        interrupted: Callable[[], bool], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`start_round(round, failures)` is asked on node 0: the plan of the round, or {"end": reason, "code": n}."""
        self.wiring, self.bound, self.start_round = wiring, rejoin_timeout_s, start_round
        self.interrupted, self.say = interrupted, say
        self.round = 0
        self.plan: dict[str, Any] = {}
        self.failure: dict[str, Any] | None = None
        self.store: TCPStore | None = None
        self.rank_store: TCPStore | None = None
        self.identity = f"{wiring.job_id}/{wiring.launch}"

    def get_backend(self) -> str:
        """Name of this kind of rendezvous."""
        return "muster"

    @property
    def use_agent_store(self) -> bool:
        """Ranks are clients of the round's store, which the agent of node 0 hosts: it outlives rank 0."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet all nodes.

        Raises:
            RendezvousTimeoutError: some node did not come within its bound.
            Ended: the job ends.
        """
        deadline = time.monotonic() + self.bound
        while True:
            try:
                return self._meet(deadline)
            except (DistError, PeerLost) as error:
                self._forget()
                if time.monotonic() > deadline:
                    raise RendezvousTimeoutError(f"node {self.wiring.node_rank}: {error}") from None

    def _meet(self, deadline: float) -> RendezvousInfo:
        store = self._connect(deadline)
        wiring = self.wiring
        if self.round == 0:  # new here: the others may be in a later round already
            self.round = int(store.add("muster/round", 0))
        self.round += 1
        key = f"muster/{self.round}"
        store.set(f"{key}/failure/{wiring.node_rank}", json.dumps(self.failure))
        self.failure = None
        store.set(f"{key}/wanted", "1")
        if wiring.node_rank == 0:
            self._wait(store, [f"{key}/failure/{node}" for node in range(wiring.nodes)], deadline)
            failures = [json.loads(store.get(f"{key}/failure/{node}")) for node in range(wiring.nodes)]
            plan = self.start_round(self.round, failures)
            if "end" not in plan:
                self.rank_store = TCPStore(wiring.master_addr, 0, None, True, STORE_TIMEOUT, wait_for_workers=False)
                plan["port"] = self.rank_store.port
                store.add("muster/round", 1)
            store.set(f"{key}/plan", json.dumps(plan))
        self._wait(store, [f"{key}/plan"], deadline)
        self.plan = json.loads(store.get(f"{key}/plan"))
        if "end" in self.plan:
            if wiring.node_rank:
                store.add("muster/told", 1)
            raise Ended(self.plan["end"], self.plan["code"])
        info = RendezvousStoreInfo(wiring.master_addr, self.plan["port"])
        return RendezvousInfo(PrefixStore(f"{key}/agents", store), wiring.node_rank, wiring.nodes, info)

    def _wait(self, store: Store, keys: list[str], deadline: float) -> None:
        """Wait for keys with progress shown, noticing stop requests and a bound."""
        shown = time.monotonic() + 5
        while not store.check(keys):
            if self.interrupted() or store.check(["muster/stop"]):
                store.set("muster/stop", "1")
                raise Ended("stopped on request before the ranks started", 75)
            missing = [key for key in keys if not store.check([key])]
            nodes = [key.rpartition("/")[2] for key in missing]
            who = ", ".join(f"{n} ({self.wiring.hostnames[int(n)]})" for n in nodes if n.isdigit()) or "0"
            if time.monotonic() > deadline:
                store.set(f"muster/{self.round}/plan", json.dumps(
                    {"end": f"peer lost: node {who} did not come within {self.bound:.0f} s", "code": 1}))  # fmt: skip
                raise RendezvousTimeoutError(f"node {who} did not come within {self.bound:.0f} s")
            if time.monotonic() > shown:
                self.say(f"waiting for node {who}: {deadline - time.monotonic():.0f} s left")
                shown = time.monotonic() + 10
            time.sleep(0.01)

    def _connect(self, deadline: float) -> TCPStore:
        if self.store is None:
            self.store = self._host() if self.wiring.node_rank == 0 else self._find(deadline)
        return self.store

    def _host(self) -> TCPStore:
        refused = []
        for port in self.wiring.ports:
            try:
                store = TCPStore(self.wiring.master_addr, port, None, True, STORE_TIMEOUT, wait_for_workers=False)
            except (DistError, RuntimeError) as error:
                refused.append(f"{port}: {str(error).splitlines()[0][:120]}")
                continue
            store.set(IDENTITY, self.identity)
            return store
        raise OSError(f"port: none of {len(refused)} candidates could be bound: {'; '.join(refused[:3])} ...")

    def _find(self, deadline: float) -> TCPStore:
        shown = time.monotonic() + 5
        while True:
            problem = "nobody listens"
            for port in self.wiring.ports:
                try:
                    with socket.create_connection((self.wiring.master_addr, port), 1):
                        pass
                    store = TCPStore(self.wiring.master_addr, port, None, False, timedelta(seconds=3),
                                     wait_for_workers=False)  # fmt: skip
                    store.wait([IDENTITY], timedelta(seconds=2))
                    if store.get(IDENTITY).decode() == self.identity:
                        store.set_timeout(STORE_TIMEOUT)
                        return store
                except ConnectionRefusedError:
                    continue
                except OSError as error:
                    problem = str(error)
                except (DistError, RuntimeError):
                    continue  # a foreign listener: the next candidate
            if self.interrupted():
                raise Ended("stopped on request before the ranks started", 75)
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError(
                    f"node {self.wiring.node_rank} found no master at {self.wiring.master_addr} within "
                    f"{self.bound:.0f} s: {problem}"
                )
            if time.monotonic() > shown:
                self.say(f"waiting for the master {self.wiring.master_addr}: {problem}; "
                         f"{deadline - time.monotonic():.0f} s left")
                shown = time.monotonic() + 10
            time.sleep(0.05)

    def _forget(self) -> None:
        """Drop a store that no longer answers; node 0 keeps its own."""
        if self.wiring.node_rank:
            self.store, self.round = None, 0
        time.sleep(0.05)

    def num_nodes_waiting(self) -> int:
        """1 when another agent asks for the next round.

        Raises:
            PeerLost: the master's store does not answer.
        """
        if self.store is None or self.wiring.nodes == 1:
            return 0
        try:
            return int(self.store.check([f"muster/{self.round + 1}/wanted"]))
        except DistError as error:
            raise PeerLost(f"the agent of node 0 does not answer: {str(error).splitlines()[0][:120]}") from None

    def stop_wanted(self) -> bool:
        """Whether some agent left before its ranks could vote."""
        return self.store is not None and self.wiring.nodes > 1 and self.store.check(["muster/stop"])

    def tell_stop(self) -> None:
        """Make the other agents stop their ranks too."""
        if self.store is not None and self.wiring.nodes > 1:
            self.store.set("muster/stop", "1")

    def beat(self) -> dict[int, int]:
        """Count this agent's beat and read all agents' counters."""
        assert self.store is not None
        self.store.add(f"muster/beat/{self.wiring.node_rank}", 1)
        return {node: int(self.store.add(f"muster/beat/{node}", 0)) for node in range(self.wiring.nodes)}

    def get_run_id(self) -> str:
        """The job's identity."""
        return self.wiring.job_id

    def is_closed(self) -> bool:
        """Never: a round ends by `Ended`."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def shutdown(self) -> bool:
        """Drop the stores."""
        self.store = self.rank_store = None
        return True
