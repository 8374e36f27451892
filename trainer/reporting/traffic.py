"""How many bytes this process has sent and received by TCP, as the kernel counts them (Linux's TCP_INFO).

That is what gloo, and NCCL between nodes without InfiniBand, exchange; not what GPUs of one machine do.
"""

import os
import socket
import stat
import struct
from contextlib import suppress

COUNTERS = struct.Struct("<QQ")
OFFSET = 120
"""Of tcpi_bytes_acked, which tcpi_bytes_received follows, in struct tcp_info of linux/tcp.h, since 4.1."""
Counts = dict[int, tuple[int, int]]
"""Bytes sent and received by each socket, by its number in the kernel."""


def read_counts() -> Counts:
    """Those of all connections that are open now."""
    found: Counts = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError, AttributeError):  # closed meanwhile, not TCP; another system
            facts = os.fstat(int(name))
            if not stat.S_ISSOCK(facts.st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) >= OFFSET + COUNTERS.size:
                found[facts.st_ino] = COUNTERS.unpack_from(info, OFFSET)
    return found


def since(before: Counts) -> tuple[int, int]:
    """Bytes sent and received since then, by connections that are still open."""
    now = read_counts()
    pairs = [(counts, before.get(number, (0, 0))) for number, counts in now.items()]
    sent, received = (sum(after[part] - earlier[part] for after, earlier in pairs) for part in (0, 1))
    return sent, received
