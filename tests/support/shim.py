"""Faults of the machine for the processes of one run: input and output that fail, and a clock that is wrong.

`fault_shim.c` does them, preloaded into each process; what it is to do stands in a page of memory shared with it.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("fault_shim.c")
FOLDER_AT = 64


class Shim:
    """A compiled shim and its page."""

    def __init__(self, folder: Path) -> None:
        self.library, self.file = folder / "shim.so", folder / "page"
        words = ["-shared", "-fPIC", "-O1", "-o", str(self.library), str(SOURCE), "-ldl"]
        subprocess.run([str(compiler()), *words], check=True)
        self.file.write_bytes(bytes(mmap.PAGESIZE))
        with self.file.open("r+b") as file:
            self.page = mmap.mmap(file.fileno(), 0)

    @property
    def variables(self) -> dict[str, str]:
        """What a process must be started with."""
        return {"LD_PRELOAD": str(self.library), "FAULT_SHIM_PAGE": str(self.file)}

    @contextmanager
    def io_errors(self, folder: Path) -> Iterator[None]:
        """Nothing below the folder can be written meanwhile."""
        path = os.fsencode(folder) + b"/\0"
        self.page[FOLDER_AT : FOLDER_AT + len(path)] = path
        self.page[0] = 1
        try:
            yield
        finally:
            self.page[0] = 0

    def set_clock(self, wrong_by_s: float) -> None:
        """Let the real-time clock be wrong from now on; 0: right again."""
        self.page[8:16] = struct.pack("q", int(wrong_by_s * 1e9))


def compiler() -> str | None:
    """The C compiler of this machine, if it has one."""
    return shutil.which("cc") or shutil.which("gcc")
