"""Standard output that cannot make its process fail: where the logs lie, the disk may be full."""

import contextlib
import io
import sys
from typing import Any


class Output(io.FileIO):
    """A log. What cannot be written is dropped, and counted as soon as something can be written again."""

    lost = 0

    def write(self, data: Any) -> int:
        """Write all of it, or as much as there is room for."""
        rest = memoryview(data).cast("B")
        size = rest.nbytes
        try:
            if self.lost:
                super().write(f"\n[muster] {self.lost} bytes of this log could not be written\n".encode())
                self.lost = 0
            while rest.nbytes:
                rest = rest[super().write(rest) or rest.nbytes :]
        except OSError:
            self.lost += rest.nbytes
        return size


def never_fail(by_line: bool = True) -> None:
    """Let what this process prints go to an `Output`, line by line, or unbuffered as what torchrun's ranks print."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        given = getattr(sys, name)
        with contextlib.suppress(OSError, AttributeError, ValueError):
            given.flush()
        text = getattr(given, "encoding", None), getattr(given, "errors", None)
        stream = io.TextIOWrapper(
            Output(number, "w", closefd=False), *text, line_buffering=by_line, write_through=not by_line
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
