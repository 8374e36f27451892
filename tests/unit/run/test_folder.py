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
