"""Following files that others append to: logs, and files of JSON lines."""

import contextlib
import os
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
        except FileNotFoundError:
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
        """Write all that is new to standard output."""
        new = self.read()
        with contextlib.suppress(OSError):  # nobody reads our output any more: the file still has it
            while new:
                new = new[os.write(sys.stdout.fileno(), new) :]


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
