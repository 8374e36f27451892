"""A run folder that is not on this machine: a program beside it, and what both say to each other."""

import contextlib
import json
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import FAILED, JobError

SILENT_S = 300.0
"""How long the other side may say nothing. It may read a large file meanwhile, to hash it."""
BLOCK = 1 << 20
STARTED = b'{"started": true}'
START = "import sys; exec(compile(sys.stdin.buffer.read({size}), 'far_side.py', 'exec'))"


class CutOff(JobError):
    """The other side, or the way there, is gone."""

    code = FAILED

    def __init__(self, what: str, problem: str) -> None:
        super().__init__("RUN", what, f"the transfer was cut off: {problem}", "Try again: it goes on where it stopped")


@dataclass(frozen=True)
class FarFolder:
    """Where a run folder is, and how to start a program there."""

    folder: str
    command: Callable[[list[str]], list[str]]
    """From words that are to be run there, to a command here whose standard input and output are theirs."""
    python: str = "python3"

    @contextlib.contextmanager
    def start(self, verb: str, *words: str) -> Iterator["Talk"]:
        """Run a verb of `far_side` there. Raises CutOff: from within, when it ends before it has said all."""
        text = Path(__file__).with_name("far_side.py").read_bytes()
        there = [self.python, "-I", "-c", START.format(size=len(text)), verb, self.folder, *words]
        pipe = subprocess.PIPE
        process = subprocess.Popen(self.command(there), stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
        talk = Talk(process, self.folder)
        try:
            talk.send(text)
            talk.await_start()
            yield talk
        finally:
            process.kill()
            for file in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError):
                    file.close()  # type: ignore[union-attr]
            process.wait()


class Talk:
    """Lines and bytes from the other side."""

    def __init__(self, process: "subprocess.Popen[bytes]", what: str) -> None:
        self.process, self.what = process, what
        self.rest = b""

    def send(self, data: bytes) -> None:
        assert self.process.stdin
        left = memoryview(data)
        try:
            while left:
                left = left[self.process.stdin.write(left) :]
        except OSError:
            raise self._cut_off() from None

    def await_start(self) -> None:
        """Pass over what login scripts print. Raises CutOff: the program there does not start."""
        passed = 0
        while passed < BLOCK:
            line = self._line()
            if line == STARTED:
                return
            passed += len(line) + 1
        raise CutOff(self.what, "it sent something other than an answer")

    def line(self) -> dict[str, Any]:
        """The next answer. Raises CutOff: what comes is none."""
        line = self._line()
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise CutOff(self.what, f"{line[:200]!r} is not an answer")
        return found

    def _line(self) -> bytes:
        while b"\n" not in self.rest:
            self.rest += self._more()
            if len(self.rest) > 2 * BLOCK:
                raise CutOff(self.what, "it sent something other than an answer")
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def read(self, size: int) -> Iterator[bytes]:
        """The next bytes, as they come."""
        while size:
            block = self.rest or self._more()
            self.rest = block[size:]
            block = block[:size]
            size -= len(block)
            yield block

    def _more(self) -> bytes:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], SILENT_S)[0]:
            raise CutOff(self.what, f"nothing came for {SILENT_S:.0f} s")
        block = self.process.stdout.read(BLOCK)
        if not block:
            raise self._cut_off()
        return block

    def _cut_off(self) -> CutOff:
        """What is known of an end that came too early."""
        assert self.process.stderr
        end = time.monotonic() + 5  # who ended it says so at once
        said = b""
        while time.monotonic() < end and select.select([self.process.stderr], [], [], 0.5)[0]:
            block = self.process.stderr.read(BLOCK)
            if not block:
                break
            said += block
        text = " ".join(said.decode(errors="replace").split())[-500:]
        return CutOff(self.what, text or "the program there ended")
