"""Where agents meet: torch's extension point for it, with fixed node ranks and an identity that is checked.

Node 0 hosts the agents' board on the first candidate port that it can bind; the others try the same ports and
accept a board only when it tells the same job. Each round has a store of its own for the ranks, so a restarted
rank never reads the addresses of a dead attempt (c10d's shared store: 4 restarts of 22 recovered).
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from trainer import __version__
from trainer.agent.kv_store import Board, PeerLost, RemoteBoard, bind
from trainer.errors import FAILED, STOPPED, WRONG_JOB
from trainer.wiring.network import own_address
from trainer.wiring.node import Wiring

STORE_TIMEOUT = timedelta(seconds=10)


VERSIONS = {"muster": __version__, "torch": str(torch.__version__)}
"""Of what must be the same on all nodes, or ranks compute different things."""


def mismatch(versions: list[dict[str, str]]) -> dict[str, Any] | None:
    """The end of the job, when nodes do not have the same packages."""
    for node, other in enumerate(versions):
        for package, version in other.items():
            if version != versions[0].get(package):
                reason = (
                    f"node {node} has {package} {version}, and node 0 {versions[0].get(package)}: use one environment"
                )
                return {"end": reason, "code": WRONG_JOB}
    return None


class Ended(RuntimeError):
    """The agents agreed that the job ends; the message is the reason, `code` the exit code."""

    def __init__(self, reason: str, code: int) -> None:
        """Keep both."""
        super().__init__(reason)
        self.code = code


class NodeRendezvous(RendezvousHandler):
    """Meets the other agents of the job in rounds; a round ends when any agent asks for the next."""

    def __init__(
        self, wiring: Wiring, first_s: float, rejoin_s: float, interrupted: Callable[[], bool],
        start_round: Callable[[int, list[Any]], dict[str, Any]], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`first_s`, `rejoin_s`: how long to wait for all nodes the first time, and after a failure.

        `start_round(round, failures)` is asked on node 0: the plan of the round, or {"end": reason, "code": n}.
        """
        self.wiring, self.bound, self.rejoin_s, self.start_round = wiring, first_s, rejoin_s, start_round
        self.interrupted, self.say = interrupted, say
        self.round = 0
        self.plan: dict[str, Any] = {}
        self.failure: dict[str, Any] | None = None
        self.identity = f"{wiring.job_id}/{wiring.launch}"
        self.board: Board | RemoteBoard | None = None
        self.rank_store: TCPStore | None = None
        # One node, or all on one machine: nobody else has any business with it.
        self.address = "127.0.0.1" if wiring.nodes == 1 or wiring.platform == "local" else ""

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
                info = self._meet(deadline)
                self.bound = self.rejoin_s
                return info
            except PeerLost as error:  # node 0: another one, or a new one in its place, may come
                self.board, self.round = None, 0
                if time.monotonic() > deadline:
                    raise RendezvousTimeoutError(f"node {self.wiring.node_rank}: {error}") from None
                time.sleep(0.05)

    def _meet(self, deadline: float) -> RendezvousInfo:
        wiring = self.wiring
        board = self.board = self.board or (self._host() if wiring.node_rank == 0 else self._find(deadline))
        if self.round == 0:  # new here: the others may be in a later round already
            self.round = board.add("round", 0)
        self.round += 1
        if self.interrupted():
            board.put("stop", True)
        board.put(f"{self.round}/failure/{wiring.node_rank}", [self.failure])
        board.put(f"{self.round}/versions/{wiring.node_rank}", VERSIONS)
        board.put(f"{self.round}/wanted", True)
        if isinstance(board, Board):
            failures = self._wait(board, [f"{self.round}/failure/{node}" for node in range(wiring.nodes)], deadline)
            versions = self._wait(board, [f"{self.round}/versions/{node}" for node in range(wiring.nodes)], deadline)
            plan = mismatch(versions) or self.start_round(self.round, [failure for [failure] in failures])
            if "end" not in plan:
                plan["port"] = self._host_ranks()
                board.add("round", 1)
            board.put(f"{self.round}/plan", plan)
        [self.plan] = self._wait(board, [f"{self.round}/plan"], deadline)
        self.failure = None
        if "end" in self.plan:
            raise Ended(self.plan["end"], self.plan["code"])
        info = RendezvousStoreInfo(self._master(), self.plan["port"])
        return RendezvousInfo(HashStore(), wiring.node_rank, wiring.nodes, info)

    def _wait(self, board: Board | RemoteBoard, keys: list[str], deadline: float) -> list[Any]:
        """Wait for values with progress shown, noticing stop requests and a bound."""
        shown = time.monotonic() + 5
        while True:
            stop, *values = board.look("stop", *keys)
            if stop or self.interrupted():
                board.put("stop", True)
                raise Ended("stopped on request before the ranks started", STOPPED)
            if None not in values:
                return values
            missing = [key for key, value in zip(keys, values, strict=True) if value is None]
            nodes = [key.rpartition("/")[2] for key in missing]
            who = ", ".join(f"{n} ({self.wiring.hostnames[int(n)]})" for n in nodes if n.isdigit()) or "0"
            if time.monotonic() > deadline:
                reason = f"node {who} did not come within {self.bound:.0f} s"
                board.put(f"{self.round}/plan", {"end": f"peer lost: {reason}", "code": FAILED})
                raise RendezvousTimeoutError(reason)
            if time.monotonic() > shown:
                self.say(f"waiting for node {who}: {deadline - time.monotonic():.0f} s left")
                shown = time.monotonic() + 10
            time.sleep(0.01)

    def _host(self) -> Board:
        board = Board(self.identity)
        if self.wiring.nodes > 1:
            board.listen(self.address, self.wiring.ports)
        return board

    def _host_ranks(self) -> int:
        """Make the store where the ranks of this round find each other; return its port."""
        with bind(self.address, 0) as listener:
            port: int = listener.getsockname()[1]
            self.rank_store = TCPStore(
                "127.0.0.1", port, None, True, STORE_TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        return port

    def _master(self) -> str:
        """Where the ranks find their store: the address that was tried, because the name may lead elsewhere by now.

        A host that was replaced under its name, as a pod is, has a new address; resolvers remember the old one a while.
        """
        if isinstance(self.board, RemoteBoard):
            return self.board.address
        return "127.0.0.1" if self.wiring.nodes == 1 else own_address(self.wiring.master_addr)

    def _find(self, deadline: float) -> RemoteBoard:
        """Node 0's board; its name is looked up anew at every try."""
        shown = time.monotonic() + 5
        ports = deque(self.wiring.ports)
        while True:
            problem = "nobody listens"
            for tried, port in enumerate(list(ports), 1):
                try:
                    return RemoteBoard(self.wiring.master_addr, port, self.identity, self.wiring.node_rank)
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
            if self.interrupted():
                raise Ended("stopped on request before the ranks started", STOPPED)
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError(
                    f"node {self.wiring.node_rank} found no master at {self.wiring.master_addr} within "
                    f"{self.bound:.0f} s: {problem}"
                )
            if time.monotonic() > shown:
                self.say(
                    f"waiting for the master {self.wiring.master_addr}: {problem}; "
                    f"{deadline - time.monotonic():.0f} s left"
                )
                shown = time.monotonic() + 10
            time.sleep(0.05)

    def news(self) -> str:
        """What other agents want: `stop`, the next `round`, that too because a rank `hung`, or nothing.

        Raises:
            PeerLost: node 0 does not answer.
        """
        if self.board is None or self.wiring.nodes == 1:
            return ""
        stop, wanted = self.board.look("stop", f"{self.round + 1}/wanted")
        if stop or not wanted:
            return "stop" if stop else ""
        told = self.board.look(*(f"{self.round + 1}/failure/{node}" for node in range(self.wiring.nodes)))
        return "hung" if any(item and item[0] and item[0]["kind"] == "hung" for item in told) else "round"

    def announce(self, failure: dict[str, Any], wait_s: float) -> None:
        """Tell the other agents of a failure before the ranks here are ended, and let them look at theirs.

        Raises:
            PeerLost: node 0 does not answer.
        """
        self.failure = failure
        if self.board is None or self.wiring.nodes == 1:
            return
        key, end = f"{self.round + 1}/failure", time.monotonic() + wait_s
        self.board.put(f"{key}/{self.wiring.node_rank}", [failure])
        self.board.put(f"{self.round + 1}/wanted", True)
        while None in self.board.look(*(f"{key}/{node}" for node in range(self.wiring.nodes))):
            if time.monotonic() > end:
                return
            time.sleep(0.02)

    def tell_stop(self) -> None:
        """Make the other agents stop their ranks too.

        Raises:
            PeerLost: node 0 does not answer.
        """
        if self.board is not None:
            self.board.put("stop", True)

    def lost_peer(self) -> tuple[int, str] | None:
        """A node whose agent is gone, as far as this one can tell, and how that shows."""
        return self.board.lost() if self.board is not None else None

    def all_done(self) -> bool:
        """Whether the ranks of every node are done in this round; tells that those of this node are.

        Raises:
            PeerLost: node 0 does not answer.
        """
        if self.board is None or self.wiring.nodes == 1:
            return True
        self.board.put(f"{self.round}/done/{self.wiring.node_rank}", True)
        return all(self.board.look(*(f"{self.round}/done/{node}" for node in range(self.wiring.nodes))))

    def num_nodes_waiting(self) -> int:
        """1 when another agent asks for the next round; torch's name for it."""
        return int(self.news() in ("round", "hung"))

    def get_run_id(self) -> str:
        """The job's identity."""
        return self.wiring.job_id

    def is_closed(self) -> bool:
        """Never: a round ends by `Ended`."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def shutdown(self) -> bool:
        """Leave the others; node 0 waits a moment for them to read why."""
        if self.board is not None:
            self.board.close()
        self.board = self.rank_store = None
        return True
