"""An export needs memory for one tensor at a time, however large the model is."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import export, files
from trainer.checkpoint.files import commit_part
from trainer.parallel.shards import cut
from trainer.run.folder import RunFolder

SIZE, COUNT = 2, 16
"""MiB of a tensor, and how many there are."""


def memory() -> float:
    """MiB of this process that lie in no file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def save(root: Path, shards: int) -> None:
    weights = {f"w{number}": torch.full((SIZE << 10, 256), float(number)) for number in range(COUNT)}
    if not shards:
        files.commit(root, 4, {"model.pt": weights, "state.pt": {}}, {}, 0)
        return
    for index in range(shards - 1, -1, -1):
        parts = {name: cut(weight, index, shards) for name, weight in weights.items()}
        commit_part(root, 4, 1, (index, shards), {"model": parts}, {}, 0, None, lambda: False)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("shards", [0, 2])
def test_no_two_tensors_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, name: str) -> None:
    """It is looked at whenever something is written."""
    saver = threading.Thread(target=save, args=(RunFolder(tmp_path).checkpoints, shards))
    saver.start()
    saver.join()
    found: list[float] = []
    new_file = export.new_file

    @contextmanager
    def watched(path: Path) -> Iterator[Any]:
        with new_file(path) as file:
            write = file.write

            def look(data: Any) -> int:
                found.append(memory())
                return write(data)

            file.write = look
            yield file

    monkeypatch.setattr(export, "new_file", watched)
    before = memory()
    export.export(RunFolder(tmp_path), tmp_path / name, None)
    assert len(found) > COUNT and max(found) - before < 2 * SIZE
