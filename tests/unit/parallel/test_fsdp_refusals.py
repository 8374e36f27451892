"""What fsdp cannot cut is refused, and named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainer.checkpoint.memory import Memory
from trainer.checkpoint.shard_keeper import ShardKeeper
from trainer.config.job import Fsdp, Job
from trainer.errors import JobError
from trainer.parallel.fsdp import FullyShard
from trainer.parallel.units import find_units
from trainer.run.folder import RunFolder
from trainer.wiring.rank import rank_wiring
from trainer.wiring.variables import RUN_SHARED

JOB = Job(task="a:B", parallel="fsdp", fsdp=Fsdp(min_params=1))


class Scaled(nn.Module):
    """Has a weight without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


def shard(model: nn.Module, layers: list[nn.Module] | None, others: str | None = None) -> None:
    """As rank 0 of one, or of two, of which the other one has a model whose hash is `others`."""
    rank: Any = object.__new__(FullyShard)
    vars(rank).update(
        job=JOB, rank=0, world_size=1, device=torch.device("cpu"), mesh=None,
        gather=lambda own: [own] if others is None else [own, others],
    )  # fmt: skip
    rank.shard_module(model, model, find_units(model, layers, 1))


@pytest.mark.parametrize("model, problem", [
    (nn.Sequential(nn.Linear(2, 2), Scaled()), r"task\.model='1\.scale': has no dimension .* shape \(1,\)"),
    (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())), r"'0': trains weights of \S+16 and \S+32"),
    (nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), r"parallel='fsdp': cannot shard 0: .*ModuleList.*parallel=ddp"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused(model: nn.Sequential, problem: str) -> None:
    with pytest.raises(JobError, match=problem):
        shard(model, [model[0]])


def test_ranks_that_build_different_models_are_refused() -> None:
    with pytest.raises(JobError, match=r"task\.model='Linear': is not the same on all ranks"):
        shard(nn.Linear(2, 2), [], "another hash")


def test_nodes_that_write_into_folders_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would have a part of every checkpoint, and none a whole one."""
    monkeypatch.setenv(RUN_SHARED, "0")
    with pytest.raises(JobError, match="these nodes do not share a run folder"):
        FullyShard(Job(task="a:B", parallel="fsdp", nodes=2), rank_wiring(), False)


def test_a_memory_for_whole_states_is_none_for_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent did not know that there would be shards: all ranks of its node would write into one memory."""
    memory = Memory.make()
    for name, value in memory.environment().items():
        monkeypatch.setenv(name, value)
    told: list[str] = []
    parallel: Any = SimpleNamespace(local_rank=0, rank=0, shard=(0, 2), devices=[], cuts_model=False)
    keeper = ShardKeeper(JOB, parallel, RunFolder(Path("run")), 0, lambda: False, told.append)
    assert not keeper.recovers and "no copies are kept in memory" in told[0]
