"""A rank that exchanges all kinds of values with others, and checks what arrives."""

from __future__ import annotations

import math
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import unpickling

from trainer.checkpoint.exchange import checksum, give_all, read_once
from trainer.checkpoint.files import DamagedCheckpoint
from trainer.config.job import Job
from trainer.errors import JobError
from trainer.parallel import messages
from trainer.parallel.ddp import Distributed
from trainer.wiring.rank import RankWiring


def talk(rank: int, ranks: int, port: int, folder: Path) -> None:
    """Be one of some ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    unpickling.forbid()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        exchange(Distributed(Job(task="a:B", device="cpu"), RankWiring(rank, ranks), True))
    except BaseException:
        (folder / f"rank-{rank}").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()


def state() -> dict[str, Any]:
    """Of all kinds of tensors; two are one, and one is a part of another."""
    torch.manual_seed(3)
    many = torch.randn(40, 30)
    return {
        "model": {"weight": many, "tied": many, "turned": many.t(), "part": many[3:5, ::2], "one": torch.randn(1)},
        "kinds": [torch.randn(7).to(kind) for kind in (torch.bfloat16, torch.float64, torch.complex64, torch.bool)],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(), "wide": torch.randn(3, 1).expand(3, 5),
        "empty": torch.empty(0, 3), "sparse": torch.eye(3).to_sparse(), "position": {"step": 3}, 7: (None, "text"),
    }  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Whether two states are bitwise alike."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    return one.dtype == other.dtype and torch.equal(one.to_dense(), other.to_dense())


def exchange(parallel: Distributed) -> None:
    """Tell and hear."""
    rank, ranks = parallel.rank, parallel.world_size
    beats: list[None] = []

    # Numbers and texts.
    values = {"name": "é" * rank, "number": 0.1 + rank, "nothing": math.inf, "list": [None, True, {"a": rank}]}
    found = parallel.gather(values)
    assert found[rank] == values and [each["list"][2]["a"] for each in found] == list(range(ranks))
    assert parallel.share(values, 1)["number"] == 1.1
    assert math.isnan(parallel.share(math.nan))
    assert parallel.mean({f"only-{rank}": 1.0, "all": float(rank)}) == {
        "all": (ranks - 1) / 2, **{f"only-{each}": 1.0 for each in range(ranks)},
    }  # fmt: skip

    # Tensors, as evaluations have them.
    sums = [(rank, {"loss": torch.tensor(1 / 3 + rank, dtype=torch.float64), "pair": torch.ones(rank, 2).bool()})]
    for number, [[name, each]] in enumerate(parallel.gather(sums)):
        assert name == number and float(each["loss"]) == 1 / 3 + number
        assert each["pair"].shape == (number, 2) and each["pair"].dtype == torch.bool
    assert parallel.any(rank == 1, lambda: beats.append(None)) and not parallel.any(False, lambda: None)

    # One comes late: the others are alive meanwhile.
    beats.clear()
    time.sleep(1.0 if rank == 0 else 0.0)
    assert not parallel.any(False, lambda: beats.append(None)) and (rank == 0 or len(beats) > 3)

    # A state, in pieces that cut tensors and join them.
    messages.PIECE = 1000
    own = state()
    given = give_all(parallel, own if rank == 1 else None, 1, lambda: beats.append(None))
    assert same(given, own) and len(beats) > 10
    assert len(set(parallel.gather(checksum(given)))) == 1
    given["model"]["weight"][39, 29] += 1 if rank == 2 else 0
    assert len(set(parallel.gather(checksum(given)))) == 2
    assert read_once(parallel, lambda: ["path", rank], lambda: None) == ["path", 0]
    for error in (JobError("key", 3, "is odd", "Give 4"), DamagedCheckpoint("x: bits have changed"), OSError(5, "IO")):
        try:
            read_once(parallel, lambda error=error: fail(error), lambda: None)  # type: ignore[misc]
        except Exception as raised:
            assert type(raised) is (RuntimeError if rank and type(error) is OSError else type(error)), raised
            assert str(error) in str(raised) or type(error) is JobError
        else:
            raise AssertionError("nobody was told")

    # What would be unpickled.
    try:
        dist.all_gather_object([None] * ranks, rank)
    except AssertionError:
        return
    raise AssertionError("an object was unpickled")


def fail(error: Exception) -> None:
    """What went wrong on rank 0."""
    raise error
