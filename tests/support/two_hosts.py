"""Two hosts as namespaces of networks with a cable between them, which can be cut without either being told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from muster_runs import wait_for

ADDRESSES = ("10.78.0.1", "10.78.0.2")
NOBODY = "02:00:00:00:00:99"


class Hosts:
    """Both of them; process ids are those of the programs that hold their namespaces."""

    def __init__(self) -> None:
        self.holders = [subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) for _ in ADDRESSES]

    def connect(self) -> None:
        """Plug the cable in."""
        one, two = self.holders
        ours = os.readlink("/proc/self/ns/net")
        for host, holder in enumerate(self.holders):
            wait_for("a namespace", lambda pid=holder.pid: os.readlink(f"/proc/{pid}/ns/net") != ours)  # type: ignore[misc]
            self.run(host, "ip", "link", "set", "lo", "up")
        self.run(0, *["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns"], str(two.pid))
        for host, address in enumerate(ADDRESSES):
            self.run(host, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
            self.run(host, "ip", "link", "set", "eth0", "up")
        assert one.poll() is two.poll() is None

    def enter(self, host: int) -> tuple[str, ...]:
        """The words that put a command onto a host."""
        return "nsenter", f"--net=/proc/{self.holders[host].pid}/ns/net", "--"

    def run(self, host: int, *command: str) -> None:
        subprocess.run([*self.enter(host), *command], check=True)

    def cut(self) -> None:
        """From now on what one sends reaches nobody."""
        for host in (0, 1):
            self.run(host, *f"ip neigh replace {ADDRESSES[1 - host]} lladdr {NOBODY} dev eth0 nud permanent".split())

    def heal(self) -> None:
        for host in (0, 1):
            self.run(host, *f"ip neigh del {ADDRESSES[1 - host]} dev eth0".split())


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Needs root; gone at the end, with all that was in them."""
    hosts = Hosts()
    try:
        hosts.connect()
        yield hosts
    finally:
        for holder in hosts.holders:
            holder.kill()
            holder.wait()
