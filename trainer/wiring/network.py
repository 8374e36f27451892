"""Addresses, interfaces and ports of this machine, as the kernel tells them."""

import contextlib
import fcntl
import hashlib
import socket
import struct

CANDIDATES = 16  # ports of a job: enough that all being taken means something else is wrong
PORTS = range(20000, 30000)
"""Below Linux's ephemeral range, 32768 to 60999 (ip(7)), where a listener can lose its port to a connection, and below
Kubernetes' NodePorts. Not read from this node: where nodes differ in it, they would never meet."""


def candidate_ports(identity: str) -> list[int]:
    """The ports that a job tries, in order; the same on every node of the job."""
    numbers = struct.unpack(">64Q", hashlib.shake_256(identity.encode()).digest(64 * 8))  # some may be the same
    return list(dict.fromkeys(PORTS[number % len(PORTS)] for number in numbers))[:CANDIDATES]


def route_to(address: str) -> tuple[str, str]:
    """The local address and interface that the kernel would use to reach `address`. Raises OSError: no route."""
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
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR, netdevice(7)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def same_host(first: str, second: str) -> bool:
    """Whether two names or addresses resolve to a common address."""
    with contextlib.suppress(OSError):
        one, other = ({item[4][0] for item in socket.getaddrinfo(name, None)} for name in (first, second))
        return bool(one & other)
    return False


def own_addresses(name: str) -> list[str]:
    """The addresses of this host that a name leads to. Raises OSError: it leads nowhere."""
    found = []
    for family, kind, _, _, target in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM):
        with socket.socket(family, kind) as probe, contextlib.suppress(OSError):
            probe.bind(target)  # fails for an address that is not ours
            found.append(str(target[0]))
    return list(dict.fromkeys(found))


def listening_addresses(name: str) -> tuple[list[str], str]:
    """Where node 0 listens for other hosts, which reach it by this name; and why, if not there where the name leads.

    An empty address stands for every interface.
    """
    try:
        found = own_addresses(name)
    except OSError as error:
        found, why = [], f"{name} does not resolve here yet ({error.strerror})"
        if name.partition(".")[0] == socket.gethostname().partition(".")[0]:  # a pod knows itself before DNS does
            with contextlib.suppress(OSError):
                found = own_addresses(socket.gethostname())
    else:
        why = f"{name} leads to {', '.join(found) or 'no address of this host'} here"
    outside = [address for address in found if not address.startswith("127.") and address != "::1"]
    return (outside, "") if outside else ([""], f"{why}: the agents listen on all interfaces")
