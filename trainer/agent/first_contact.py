"""How the agents find each other: node 0 serves what they share, the others look for it among the candidate ports."""

import random
import socket
from collections import deque
from collections.abc import Callable

from trainer.agent.kv_client import KeyValueClient, SilentError
from trainer.agent.kv_server import PROOFS_PER_S, KeyValueServer
from trainer.agent.kv_store import ANSWER_S, CONNECT_S
from trainer.agent.proof import Membership
from trainer.wiring.network import listening_addresses
from trainer.wiring.node import Wiring

RETRY_S, RETRIES_PER_S = 0.05, 2000
"""Between two tries to reach node 0, and how often all nodes together may try."""


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
    ports = deque(wiring.ports)
    proof_s, pause_s = CONNECT_S + wiring.nodes / PROOFS_PER_S, RETRY_S / 8
    while True:
        problem = "nobody listens"
        for tried, port in enumerate(list(ports), 1):
            try:
                return KeyValueClient(wiring.master_addr, port, membership, wiring.node_rank, wiring.nodes, proof_s)
            except ConnectionRefusedError:
                continue
            except socket.gaierror as error:
                problem = f"the name does not resolve: {error.strerror}"
                break
            except TimeoutError as error:  # a host that is gone, or a foreign listener: from the next candidate on
                problem = "no answer"
                ports.rotate(-tried)
                if isinstance(error, SilentError):  # or node 0 itself, which is slow
                    proof_s = min(2 * proof_s, ANSWER_S)
                break
            except OSError as error:
                problem = f"port {port}: {error}"
        pause_s = min(2 * pause_s, max(RETRY_S, wiring.nodes / RETRIES_PER_S))
        pause(problem, pause_s * random.uniform(0.5, 1))
