"""The newest checkpoint that is whole, found by all ranks together: each verifies a share of the files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.checkpoint.files import DamagedCheckpoint, read_share, verify_share
from trainer.parallel.base import Parallel
from trainer.run.folder import committed


def newest_together(
    parallel: Parallel, root: Path, shard: tuple[int, int], tidy: Callable[[], None],
    refuse: Callable[[Path, str], None], beat: Callable[[], None],
) -> tuple[str, list[Any]] | None:  # fmt: skip
    """Its name, and what this rank needs of it; None: there is no checkpoint.

    Rank 0 tidies up before, and is told of those that are damaged. `beat`: signs of life. Raises DamagedCheckpoint: on
    all ranks, none is whole.
    """
    names: list[str] = []
    if parallel.rank == 0:
        tidy()
        names = [folder.name for folder in committed(root)]
    parallel.any(False, beat)  # the others wait here, with signs of life
    refused = []
    for folder in (root / name for name in parallel.share(names)):
        problem = ""
        try:
            verify_share(folder, parallel.rank, parallel.world_size, beat)
        except DamagedCheckpoint as error:
            problem = str(error)
        parallel.any(False, beat)
        problem = next(filter(None, parallel.gather(problem)), "")
        if not problem:
            return folder.name, read_share(folder, shard)
        refused.append(problem)
        if parallel.rank == 0:
            refuse(folder, problem)
    if refused:
        raise DamagedCheckpoint("every checkpoint is damaged: " + "; ".join(refused))
    return None
