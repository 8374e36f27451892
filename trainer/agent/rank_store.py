"""The store where the ranks of a round find each other: torch's TCPStore, served by a process of its own.

The process comes from the fork server, which has torch: so the agent itself never imports it, and a node pays for it
once. It is not a rank, and outlives them all.
"""

import multiprocessing
import socket
from datetime import timedelta

from trainer.agent.fork_server import PROCESSES
from trainer.agent.kv_server import bind


class RankStore:
    """The agent's side of one store."""

    def __init__(self, address: str) -> None:
        """Serve on a free port of `address`; empty: on every interface."""
        with bind(address, 0) as listener:
            self.port: int = listener.getsockname()[1]
            self.process = PROCESSES.Process(
                target=serve, args=(listener, address or "127.0.0.1", self.port), name="muster-store"
            )
            self.process.start()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def serve(listener: socket.socket, address: str, port: int) -> None:
    """Serve until the agent is gone."""
    from torch.distributed import TCPStore

    descriptor = listener.detach()
    store = TCPStore(
        address, port, None, True, timedelta(seconds=10), wait_for_workers=False, master_listen_fd=descriptor
    )
    agent = multiprocessing.parent_process()
    assert agent is not None
    agent.join()
    del store
