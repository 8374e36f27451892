"""A file of JSON lines that a running job adds to: that it cannot be written must never end the job."""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.records import open_lines, to_line, write_line

RETRY_S = 10.0
"""How long a file is left alone after it could not be written: a server that is gone may take long to say so."""
LEAST_RETRY_S = 1.0
"""Before the next try when nobody writes meanwhile."""
KEPT = 10_000
"""Lines that wait in memory for a file that cannot be written now."""


class LineFile:
    """A file of JSON lines. What cannot be written now waits in memory and follows; that is said once."""

    def __init__(self, path: Path, retry_s: float = RETRY_S, stays_open: bool = True) -> None:
        """`stays_open`: else it is closed after each line, so that other machines see it at once, on NFS too."""
        self.path, self.retry_s, self.stays_open = path, retry_s, stays_open
        self.waiting: deque[bytes] = deque()
        self.lost = 0
        self.failed_at: float | None = None
        self.handle: int | None = None
        self.lock = threading.Lock()
        self.retries = False
        """Whether a thread will try again: what waits may be the last word, which no other line follows."""

    def write(self, value: Mapping[str, Any]) -> None:
        """Append a line, or keep it for later."""
        with self.lock:
            self.waiting.append(to_line(value))
            if len(self.waiting) > KEPT:
                self.waiting.popleft()
                self.lost += 1
            if self.failed_at is None or time.monotonic() - self.failed_at >= self.retry_s:
                self._flush()

    def flush(self) -> None:
        """Try now to write what waits."""
        with self.lock:
            self._flush()

    def close(self) -> None:
        """Nothing follows. What still cannot be written is lost, and counted."""
        with self.lock:
            self._flush()
            self._close()
            if self.waiting:
                self.lost += len(self.waiting)
                self.waiting.clear()
                warn(f"{self.path}: {self.lost} lines could not be written and are lost")

    def _flush(self) -> None:
        try:
            while self.waiting:
                self.handle = self._open() if self.handle is None else self.handle
                write_line(self.handle, self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            self._close()
            if self.failed_at is None:
                warn(f"{self.path} cannot be written: {error.strerror}. The job goes on; lines wait in memory for it")
            self.failed_at = time.monotonic()
            self._retry_later()
            return
        if self.failed_at is not None:
            self.failed_at = None
            warn(f"{self.path} can be written again; {self.lost} lines are lost")
        if not self.stays_open:
            self._close()

    def _retry_later(self) -> None:
        if not self.retries:
            self.retries = True
            timer = threading.Timer(max(self.retry_s, LEAST_RETRY_S), self._retry)
            timer.daemon = True
            timer.start()

    def _retry(self) -> None:
        with self.lock:
            self.retries = False
            if self.waiting:
                self._flush()

    def _open(self) -> int:
        self.path.parent.mkdir(exist_ok=True)
        return open_lines(self.path)

    def _close(self) -> None:
        if self.handle is not None:
            with contextlib.suppress(OSError):  # NFS may say only here that a line was not written
                os.close(self.handle)
            self.handle = None


def warn(text: str) -> None:
    """Print a warning into the log, if that can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(f"WARNING: {text}", file=sys.stderr, flush=True)
