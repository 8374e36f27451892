"""What a rank is told by its environment. The only module that reads rank variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from trainer.errors import JobError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankWiring:
    """One rank's place, as torchrun's variables tell it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    attempt: int = 0


def rank_wiring() -> RankWiring:
    """Read the rank variables once.

    Raises:
        JobError: some are set and others not.
    """
    present = [name for name in RANK_VARIABLES if os.environ.get(name)]
    missing = [name for name in RANK_VARIABLES if name not in present]
    if not present:
        return RankWiring()
    if missing:
        raise JobError(missing[0], None, f"is not set, but {', '.join(present)} are: the environment is partial",
                       "Start ranks by muster, torchrun or another launcher that sets all of them")
    return RankWiring(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        attempt=int(os.environ.get("MUSTER_ATTEMPT", "0")),
    )
