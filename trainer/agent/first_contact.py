"""How the agents find each other: node 0 serves what they share, the others look for it among the candidate ports."""

import random
import socket
import threading
from collections import deque
from collections.abc import Callable

from trainer.agent.kv_client import KeyValueClient, SilentError
from trainer.agent.kv_server import PROOFS_PER_S, KeyValueServer
from trainer.agent.kv_store import ANSWER_S, CONNECT_S
from trainer.agent.proof import Membership
from trainer.wiring.network import listening_addresses
from trainer.wiring.node import Wiring

NOBODY = "nobody listens"
RETRY_S, RETRIES_PER_S = 0.05, 2000
"""Between two tries to reach node 0, and how often all nodes together may try."""
ANSWERED_S = 0.1  # how long an answer is waited for before the next try, of which other listeners are asked


def serve_store(wiring: Wiring, membership: Membership, say: Callable[[str], None]) -> KeyValueServer:
    """On node 0: listen where the others look for it, and nowhere else. Raises OSError: every port is taken."""
    server = KeyValueServer(membership, wiring.nodes)
    addresses, why = (["127.0.0.1"], "") if wiring.is_one_machine else listening_addresses(wiring.master_addr)
    if why:
        say(why)
    if wiring.nodes > 1:
        server.listen(addresses, wiring.ports)
    return server


def find_store(wiring: Wiring, membership: Membership, pause: Callable[[str, float], None]) -> KeyValueClient:
    """Find node 0 among those who listen; its name is looked up anew at every try.

    `pause(problem, seconds)` is called between two tries, and raises what ends them.
    """
    search, found, pause_s = _Search(wiring, membership), None, RETRY_S / 8
    try:
        while not (found := search.look()):
            pause_s = min(2 * pause_s, max(RETRY_S, wiring.nodes / RETRIES_PER_S))
            pause(search.problem, pause_s * random.uniform(0.5, 1))
        return found
    finally:
        search.end(found)


class _Search:
    """Asks all who listen at the same time: whoever says nothing, or says it slowly, holds up nobody but himself."""

    def __init__(self, wiring: Wiring, membership: Membership) -> None:
        self.wiring, self.membership = wiring, membership
        self.ports, self.problem = deque(wiring.ports), NOBODY
        self.patience = dict.fromkeys(wiring.ports, CONNECT_S + wiring.nodes / PROOFS_PER_S)
        self.problems: dict[int, str] = {}  # by port, the newest last
        self.asked: set[int] = set()  # the ports where somebody has not answered yet
        self.changed = threading.Condition()  # guards what follows from answers: all that is above, and below
        self.found: KeyValueClient | None = None
        self.is_over = False

    def look(self) -> KeyValueClient | None:
        """Ask those who listen and are not being asked already, and wait a moment for an answer."""
        try:
            for tried, port in enumerate(list(self.ports), 1):
                if port not in self.asked and self._reach(port):
                    self.ports.rotate(-tried)  # a host that is gone, or a foreign listener: from the next candidate on
                    break
        except socket.gaierror as error:
            self.problem = f"the name does not resolve: {error.strerror}"
            return self.found
        with self.changed:
            self.changed.wait_for(lambda: self.found or not self.asked, ANSWERED_S)
            self.problem = next(reversed(self.problems.values()), NOBODY)
            return self.found

    def end(self, taken: KeyValueClient | None) -> None:
        """Leave whoever was found since, and whoever answers from here on."""
        with self.changed:
            self.is_over = True
        if self.found is not None and self.found is not taken:
            self.found.close()

    def _reach(self, port: int) -> bool:
        """Ask who listens there, if somebody does; whether that took too long."""
        problem = f"port {port}: no answer"  # until there is one
        try:
            connection = socket.create_connection((self.wiring.master_addr, port), CONNECT_S)
        except ConnectionRefusedError:
            self._note(port, None)
            return False
        except socket.gaierror:
            raise
        except OSError as error:
            is_late = isinstance(error, TimeoutError)
            self._note(port, problem if is_late else f"port {port}: {error}")
            return is_late
        self._note(port, problem)
        self.asked.add(port)
        threading.Thread(target=self._ask, args=(port, connection), name="kv-search", daemon=True).start()
        return False

    def _note(self, port: int, problem: str | None) -> None:
        with self.changed:
            self.problems.pop(port, None)
            if problem:
                self.problems[port] = problem

    def _ask(self, port: int, connection: socket.socket) -> None:
        """Let him prove himself who listens there."""
        wiring, found, patience = self.wiring, None, self.patience[port]
        try:
            found = KeyValueClient(connection, self.membership, wiring.node_rank, wiring.nodes, patience)
        except SilentError:  # it may be node 0 itself, which is slow
            self.patience[port] = min(2 * patience, ANSWER_S)
        except OSError as error:
            self._note(port, f"port {port}: {error}")
        finally:
            self._answered(port, found)

    def _answered(self, port: int, found: KeyValueClient | None) -> None:
        with self.changed:
            self.asked.discard(port)
            is_taken = found is not None and not self.is_over and self.found is None
            if is_taken:
                self.found = found
            self.changed.notify_all()
        if found is not None and not is_taken:
            found.close()
