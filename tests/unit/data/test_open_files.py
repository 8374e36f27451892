"""Files that a dataset opened in its constructor, read by several workers at once."""

from __future__ import annotations

import io
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from torch import Tensor
from torch.utils.data import Dataset

from trainer.config.job import Data
from trainer.data.loader import Loader
from trainer.tasks.digits import Digits

COUNT, SIZE = 64, 5000


class Raw(Dataset[Tensor]):
    """Records in a file that has a header."""

    def __init__(self, folder: Path) -> None:
        path = folder / "records"
        path.write_bytes(b"HEAD" + b"".join(bytes([index]) * SIZE for index in range(COUNT)))
        self.file = path.open("rb", buffering=0)
        assert self.file.read(4) == b"HEAD"
        path.unlink()

    def __len__(self) -> int:
        return COUNT

    def read(self, index: int) -> bytes:
        """A record; the others find time to read theirs."""
        self.file.seek(4 + index * SIZE)
        time.sleep(0.0005)
        return self.file.read(SIZE) or b""

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(list(set(self.read(index))))


class Buffered(Raw):
    """With a buffer, and read from where the constructor stopped."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.buffered = io.BufferedReader(self.file, 2 * SIZE)
        self.buffered.peek(1)

    def read(self, index: int) -> bytes:
        """A record, relative to where the reader is."""
        self.buffered.seek(4 + index * SIZE - self.buffered.tell(), io.SEEK_CUR)
        time.sleep(0.0005)
        return self.buffered.read(SIZE)


class Zipped(Raw):
    """Members of an archive."""

    def __init__(self, folder: Path) -> None:
        with zipfile.ZipFile(folder / "records.zip", "w") as new:
            for index in range(COUNT):
                new.writestr(str(index), bytes([index]) * SIZE)
        self.archive = zipfile.ZipFile(folder / "records.zip")

    def read(self, index: int) -> bytes:
        """A member."""
        return self.archive.read(str(index))


@pytest.mark.parametrize("kind", [Raw, Buffered, Zipped])
def test_each_worker_reads_what_it_asks_for(kind: Any, tmp_path: Path) -> None:
    loader = Loader(kind(tmp_path), Digits(), Data(workers=2, prefetch=4), 0, False)
    try:
        for epoch in range(2):
            keys = [(epoch, np.arange(start, start + 2)) for start in range(0, COUNT, 2)]
            found = [batch.flatten().tolist() for batch in loader.read(keys)]
            assert found == [[index, index + 1] for index in range(0, COUNT, 2)]
    finally:
        loader.close()


PLACES = """
import os, sys
from trainer.data.open_files import take_own_places

found = []
for flags in (os.O_RDONLY, os.O_RDWR):
    number = os.open(sys.argv[1], flags)
    other = os.dup(number)
    os.lseek(number, 4, os.SEEK_SET)
    found.append((number, other))
take_own_places()
for number, other in found:
    print(os.read(number, 1), os.lseek(other, 0, os.SEEK_CUR), os.get_inheritable(number))
"""


def test_a_place_is_kept_and_what_is_written_stays_shared(tmp_path: Path) -> None:
    """Processes that write to one file must not overwrite each other."""
    path = tmp_path / "records"
    path.write_bytes(b"0123456789")
    command = [sys.executable, "-c", PLACES, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["b'4' 4 False", "b'4' 5 False"]
