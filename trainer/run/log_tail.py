"""Copying what is appended to a log to this process's output, so that `docker logs` and a terminal show rank 0."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


class Tail:
    """Follows one file from its present end."""

    def __init__(self, path: Path) -> None:
        """The file need not exist yet."""
        self.path = path
        self.offset = size(path)

    def copy(self) -> None:
        """Write what is new to standard output."""
        try:
            if self.path.stat().st_size == self.offset:
                return
            with self.path.open("rb") as file:
                file.seek(self.offset)
                new = file.read()
        except FileNotFoundError:
            return
        self.offset += len(new)
        with contextlib.suppress(OSError):  # nobody reads our output any more: the log has it
            os.write(sys.stdout.fileno(), new)


def size(path: Path) -> int:
    """Bytes of a file; 0 when there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def last_lines(path: Path, begin: int = 0, most: int = 4000) -> str:
    """The end of a log from its byte `begin` on, at most `most` bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(begin, size(path) - most))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
