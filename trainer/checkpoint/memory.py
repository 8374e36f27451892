"""Memory that outlives a killed rank: the agent of a node owns it, its ranks and whoever writes checkpoints map it.

It is gone when the agent is gone, however the agent ends (memfd_create(2)). There are two buffers, so that one is whole
while the other is filled, and a page that says what is in them. How a state lies in a buffer is in
`trainer.checkpoint.snapshot`. Never imports torch.

Who holds the lock of a buffer may change it, or count on it to stay: a rank while it fills it, and whoever writes a
checkpoint from it, who gets the lock with the order. It is the kernel's (flock(2)), which knows no dead owner.
"""

import contextlib
import fcntl
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from trainer.wiring.variables import MEMORY, read_words

BUFFERS = 2
FOR_SHARDS = 3
"""Buffers of a rank that has a memory of its own."""
MOMENTS = 4
ATTEMPT = struct.Struct("<q")
"""The newest attempt of the agent."""
SEAL = struct.Struct("<qqqqqI")
SEALS = 64
"""Where they begin; one for each buffer."""


@dataclass(frozen=True, order=True)
class Seal:
    """What a buffer holds, written when it is whole.

    Its checksum covers the seal and the head of the state, so a torn one is noticed. The tensors have none: it would
    take longer than to copy them, nobody writes a sealed buffer, and the seal comes after them.
    """

    moment: int
    """`MOMENTS` times the steps done, plus how much is done after the last one. States of one moment are equal."""
    attempt: int
    offset: int
    """Where the head begins, behind the tensors."""
    size: int
    """Bytes of the head."""
    run: int
    """The checksum of the run folder's name: a script may have several sessions, one after the other."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.moment // MOMENTS

    def pack(self, head: bytes) -> bytes:
        """As it is written."""
        numbers = (self.moment, self.attempt, self.offset, self.size, self.run)
        return SEAL.pack(*numbers, zlib.crc32(head, zlib.crc32(SEAL.pack(*numbers, 0))))


class Memory:
    """The memory of one node, from any side."""

    def __init__(self, page: str, *buffers: str) -> None:
        """The paths of its files, which their maker holds open."""
        self.paths, self.buffers = (page, *buffers), buffers
        with open(page, "r+b") as file:
            self.page = mmap.mmap(file.fileno(), 0)

    @classmethod
    def make(cls, count: int = BUFFERS) -> "Memory":
        """New and empty, with so many buffers; this process owns it."""
        page, *buffers = (os.memfd_create(f"muster-{name}") for name in ("page", *map(str, range(count))))
        os.ftruncate(page, SEALS + count * SEAL.size)
        return cls(*(f"/proc/{os.getpid()}/fd/{handle}" for handle in (page, *buffers)))

    @classmethod
    def find(cls) -> "Memory | None":
        """A rank's, through the environment; None without an agent."""
        paths = read_words(MEMORY)
        try:
            found = cls(*paths) if paths else None
        except OSError:  # hardened against looking into other processes: the checkpoints on disk are left
            return None
        return found if found is not None and found.has_locks() else None

    def has_locks(self) -> bool:
        """Whether this process may lock: a sandbox may forbid it."""
        try:
            handle = self.lock(0)
        except OSError:
            return False
        if handle is not None:
            os.close(handle)
        return True

    def environment(self) -> dict[str, str]:
        """What lets ranks find it."""
        return {MEMORY: " ".join(self.paths)}

    @property
    def attempt(self) -> int:
        """The owner's newest attempt: while it is also the run's, what an earlier one saved may still be written."""
        return int(ATTEMPT.unpack_from(self.page)[0])

    @attempt.setter
    def attempt(self, value: int) -> None:
        ATTEMPT.pack_into(self.page, 0, value)

    def lock(self, index: int) -> int | None:
        """A descriptor of a buffer with its lock; None while another has that."""
        handle = os.open(self.buffers[index], os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def seal(self, index: int, seal: Seal, head: bytes) -> None:
        """A buffer is whole."""
        place = SEALS + index * SEAL.size
        self.page[place : place + SEAL.size] = seal.pack(head)

    def unseal(self, index: int) -> None:
        """A buffer will be written, or must not be read again."""
        place = SEALS + index * SEAL.size
        self.page[place : place + SEAL.size] = bytes(SEAL.size)

    def sealed(self, run: int | None = None) -> dict[int, Seal]:
        """The whole buffers, or those of one run."""
        found = {}
        for index, path in enumerate(self.buffers):
            place = SEALS + index * SEAL.size
            data = self.page[place : place + SEAL.size]
            seal = Seal(*SEAL.unpack(data)[:-1])
            if seal.size > 0 and seal.pack(read_head(path, seal)) == data:
                found[index] = seal
        return {index: seal for index, seal in found.items() if run in (None, seal.run)}

    @property
    def step(self) -> int:
        """Steps done in the newest whole buffer, -1 without one."""
        return max((seal.step for seal in self.sealed().values()), default=-1)


def read_head(path: str, seal: Seal) -> bytes:
    """The head of the state in a buffer."""
    with contextlib.suppress(OSError, ValueError), Path(path).open("rb", buffering=0) as file:
        file.seek(seal.offset)
        return file.read(seal.size)
    return b""
