"""Limits on wall-clock time, which count only when a machine has nothing else to do: in `make test-speed`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """What a test says about time. A limit that is missed fails the test in a run of speed tests, and not otherwise."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict

    @contextmanager
    def at_most(self, limit_s: float) -> Iterator[None]:
        """The block may take this long."""
        began = time.monotonic()
        yield
        self.check(time.monotonic() - began, limit_s)

    def check(self, seconds: float, limit_s: float, what: str = "this") -> None:
        """A time that was measured otherwise, such as between two events."""
        assert not self.strict or seconds < limit_s, f"{what} took {seconds:.2f} s, not {limit_s:.2f} s at most"
