"""Files that one rank of a node makes for all of them, such as downloads."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.parallel.base import Parallel
from trainer.reporting.heartbeat import Pulse


def make_once(path: Path, make: Callable[[Path], Any], parallel: Parallel, pulse: Pulse) -> Path:
    """`path`, which the first rank of a node has `make` write if it is not there; the others wait.

    Rank 0 comes before the first ranks of other nodes, for nodes may share a disk. `make` writes a file or a folder at
    another path beside it, which gets its name when it is whole. Raises OSError: it made nothing there.
    """
    for turn in (0, 1):
        if parallel.local_rank == 0 and turn == min(parallel.rank, 1) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.stem}-{os.getpid()}-{parallel.rank}{path.suffix}")
            make(part)
            _sync(part)
            part.rename(path)
        parallel.meet()
        pulse.beat(0, "starting")
    return path


def _sync(path: Path) -> None:
    """Have a file on the disk before it gets its name."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
