"""Files that are on the disk when they are closed, with the hash of what was written to them."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import get_crc32_options, set_crc32_options


class Hashing:
    """A file that hashes what is written: torch.save's zip writer seeks nowhere, so one pass is enough."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.flush = file, hashlib.sha256(), file.flush

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.file.write(view)
        return len(view)


def dump(value: Any, file: Any) -> None:
    """Write what torch.load reads, without zip's own checksums, which would block all threads."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        torch.save(value, file)
    finally:
        set_crc32_options(before)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is on the disk when it is closed."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_hashed(path: Path, write: Callable[[Any], None]) -> dict[str, Any]:
    with new_file(path) as file:
        hashing = Hashing(file)
        write(hashing)
        return {"bytes": file.tell(), "sha256": hashing.digest.hexdigest()}
