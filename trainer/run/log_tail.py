"""Following files that others append to: logs, events, and other files of JSON lines."""

import os
import select
import sys
import time
from pathlib import Path

from trainer.records import parse_lines
from trainer.run.event_files import Event, is_event
from trainer.run.folder import RunFolder

EACH_S = 0.001
"""For how long a file of events is left alone for each that there is: a thousand nodes have as many."""


class Tail:
    """What is appended to one file, from its present end on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = size(path)

    def read(self) -> bytes:
        """All that is new."""
        try:
            if self.path.stat().st_size == self.offset:
                return b""
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
        write_out(self.read())


class EventTail:
    """The events that are recorded from now on, by whatever writer."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.tails = {path: Tail(path) for path in run.event_files()}
        self.next = 0.0

    def events(self, last: bool = False) -> list[Event]:
        """The new ones, those that come together in the order of their times; `last`: nobody asks again."""
        if not last and time.monotonic() < self.next:
            return []
        for path in self.run.event_files():
            if path not in self.tails:
                self.tails[path] = Tail(path)
                self.tails[path].offset = 0
        self.next = time.monotonic() + EACH_S * len(self.tails)
        found = [event for tail in self.tails.values() for event in parse_lines(tail.lines())]
        return sorted(filter(is_event, found), key=lambda event: float(event["time"]))


def write_out(text: bytes) -> None:
    """Write to standard output, at once and as it is. Raises BrokenPipeError: nobody reads it."""
    while text:
        text = text[os.write(sys.stdout.fileno(), text) :]


def nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has ended, as with `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(happened & select.POLLERR for _, happened in poll.poll(0))


def size(path: Path) -> int:
    """Bytes of a file; 0 when there is none, or its server does not answer now."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def last_lines(path: Path, begin: int = 0, most: int = 4000) -> str:
    """The end of a log from its byte `begin` on, at most `most` bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(begin, size(path) - most))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
