"""Which saves may fail, and for how long."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint import keeper
from trainer.checkpoint.keeper import Keeper
from trainer.checkpoint.memory import Memory
from trainer.config.job import Checkpoints, Job
from trainer.parallel.base import Parallel
from trainer.run.folder import RunFolder
from trainer.wiring.rank import RankWiring


@pytest.fixture
def insist(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """Saves to a disk that refuses each with this error, and counts the tries; a copy in memory holds the state."""
    memory = Memory.make()
    for name, value in memory.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(keeper, "LOOK_S", 0.01)
    job = Job(device="cpu", parallel="single", checkpoint=Checkpoints(asynchronous=False))
    kept = Keeper(job, Parallel(job, RankWiring()), RunFolder(Path("run")), 0, lambda: False, lambda text: None)
    tries: list[int] = []

    def refuse(number: int) -> int:
        def commit(*_: Any) -> None:
            tries.append(number)
            raise OSError(number, "no")

        monkeypatch.setattr(keeper, "commit", commit)
        kept.limit_s = 0.1
        order: Any = None
        with pytest.raises(OSError, match="no"):
            kept.insist(lambda: kept.save(order, 5, {"model": {}}, lambda: None), lambda: None)
        return len(tries)

    return refuse


def test_a_disk_that_stays_full_ends_the_training(insist: Callable[[int], int]) -> None:
    """When it was tried again for as long as a disk may hang."""
    assert insist(errno.ENOSPC) > 1


def test_an_error_that_does_not_pass_is_raised_at_once(insist: Callable[[int], int]) -> None:
    assert insist(errno.EACCES) == 1
