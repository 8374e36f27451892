"""What a run folder says without torch."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.run.folder import RunFolder


def test_the_size_of_the_state(tmp_path: Path) -> None:
    """It is that of the newest checkpoint, whose manifest says it."""
    run = RunFolder(tmp_path)
    assert run.state_bytes() == 0
    for step, sizes in ((5, [1]), (12, [7, 5])):
        folder = run.checkpoints / f"step-{step:09d}"
        folder.mkdir(parents=True)
        files = {str(number): {"bytes": size} for number, size in enumerate(sizes)}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
    assert run.state_bytes() == 12


def test_logs_of_many_ranks_are_grouped(tmp_path: Path) -> None:
    """All ranks make files there at the same moment. Those of the first hundred stay where they always were."""
    run = RunFolder(tmp_path)
    ranks = range(1024 * 8)
    files = {rank: run.rank_log(rank).relative_to(run.logs).as_posix() for rank in ranks}
    assert (files[0], files[99], files[4711]) == ("rank-0.log", "rank-99.log", "ranks-4700/rank-4711.log")
    folders = [path.rpartition("/")[0] for path in files.values()]
    assert max(map(folders.count, set(folders))) == 100 and len(set(folders)) == 82
    assert run.stacks(4711).parent == run.rank_log(4711).parent
    assert run.logs_of_ranks(4711) == run.logs_of_ranks() == []
    for path in (run.logs / "rank-4711.log", run.rank_log(4711)):  # begun by an older version, and continued
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [path.parent.name for path in run.logs_of_ranks(4711)] == ["logs", "ranks-4700"]
    assert len(run.logs_of_ranks()) == 2
