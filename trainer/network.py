"""Addresses, interfaces and ports of this machine, as the kernel tells them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import socket
import struct
from pathlib import Path

PORTS = 16
"""Candidates of a job: enough that all being taken means something else is wrong."""


def ephemeral_range() -> tuple[int, int]:
    """The ports that the kernel gives to outgoing connections (ip(7)); a listener inside it can lose its port."""
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999


def candidate_ports(identity: str) -> list[int]:
    """The ports that a job tries, in order; the same on every node of the job, outside the ephemeral range."""
    low, high = ephemeral_range()
    free = [*range(20000, min(low, 65536)), *range(max(high + 1, 20000), 65536)] or list(range(20000, 65536))
    ports: list[int] = []
    number = 0
    while len(ports) < PORTS:
        digest = hashlib.sha256(f"{identity}/{number}".encode()).digest()
        port = free[int.from_bytes(digest[:8], "big") % len(free)]
        if port not in ports:
            ports.append(port)
        number += 1
    return ports


def route_to(address: str) -> tuple[str, str]:
    """The local address and interface that the kernel would use to reach `address`.

    Raises:
        OSError: there is no route.
    """
    family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # a datagram socket sends nothing on connect
        local = probe.getsockname()[0]
    return local, interface_of(local)


def interface_of(address: str) -> str:
    """The interface that owns an IPv4 address; `lo` for loopback, empty when it cannot be told."""
    if address.startswith("127.") or address == "::1":
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR, netdevice(7)
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def resolves(address: str) -> str | None:
    """Why a host name does not resolve, None when it does."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        return str(error)
    return None


def same_host(first: str, second: str) -> bool:
    """Whether two names or addresses resolve to a common address."""
    try:
        return bool(
            {item[4][0] for item in socket.getaddrinfo(first, None)}
            & {item[4][0] for item in socket.getaddrinfo(second, None)}
        )
    except OSError:
        return False


def own_address(name: str) -> str:
    """The address of this host that `name` leads to; the loopback while it leads nowhere or to another host."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, _, _, target in found:
        with socket.socket(family, kind) as probe, contextlib.suppress(OSError):
            probe.bind(target)  # fails for an address that is not ours
            return str(target[0])
    return "127.0.0.1"
