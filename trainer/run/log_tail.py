"""Following files that others append to: logs, and files of JSON lines."""

import os
import select
import sys
from pathlib import Path


class Tail:
    """What is appended to one file, from its present end on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = size(path)

    def read(self) -> bytes:
        """All that is new."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                new = file.read()
        except OSError:  # it is not there yet, or its server does not answer now
            return b""
        self.offset += len(new)
        return new

    def lines(self, ended: bool = False) -> list[str]:
        """The new lines. One that is still being written comes later, unless the file has `ended`."""
        new = self.read()
        whole = len(new) if ended else new.rfind(b"\n") + 1
        self.offset -= len(new) - whole
        return new[:whole].decode(errors="replace").removesuffix("\n").split("\n") if whole else []

    def copy(self) -> None:
        """Write all that is new to standard output. Raises BrokenPipeError: nobody reads it."""
        new = self.read()
        while new:
            new = new[os.write(sys.stdout.fileno(), new) :]


def nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has ended, as with `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(happened & select.POLLERR for _, happened in poll.poll(0))


def size(path: Path) -> int:
    """Bytes of a file; 0 when there is none."""
    return path.stat().st_size if path.exists() else 0


def last_lines(path: Path, begin: int = 0, most: int = 4000) -> str:
    """The end of a log from its byte `begin` on, at most `most` bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(begin, size(path) - most))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
