"""What a new attempt finds in the run folder, and what it leaves there."""

from __future__ import annotations

from pathlib import Path

from trainer.run import attempts
from trainer.run.folder import RunFolder


def test_what_killed_ranks_were_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.failures.mkdir()
    torn = [
        run.failures / ".attempt-3-rank-0.json.812-0a1b2c", tmp_path / ".result.json.7-ffffff",
        tmp_path / ".evaluation.json.7-000000",
    ]  # fmt: skip
    kept = [
        run.failures / "attempt-3-rank-0.json", run.failures / ".notes", run.result, tmp_path / ".result.json.swp",
        tmp_path / ".handle.json.5-aaaaaa",  # the supervisor may be writing it now
    ]  # fmt: skip
    for path in (*torn, *kept):
        path.write_text("{")
    attempts.claim(run, 4)
    assert not [path for path in torn if path.exists()] and all(path.exists() for path in kept)
