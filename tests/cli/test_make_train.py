"""What a newcomer does first: `make train` in a fresh clone, which sets everything up and trains the main job."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from paths import ROOT
from stopwatch import Stopwatch


@pytest.mark.timeout(900)
def test_make_train_in_a_fresh_clone(tmp_path: Path, stopwatch: Stopwatch) -> None:
    """Of the files as they are, committed or not."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    clone = tmp_path / "clone"
    for name in filter(None, (item.decode() for item in listed)):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
            (clone / name).chmod((ROOT / name).stat().st_mode)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MUSTER_", "VIRTUAL_ENV"))}
    first = subprocess.run(["make", "train"], cwd=clone, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "set-up: " in first.stderr  # it says what it installs
    (run,) = (clone / "runs").glob("*-*")
    result = json.loads((run / "result.json").read_text())
    assert result["world_size"] == 2
    assert result["metrics"]["accuracy"] >= 0.975, result
    stopwatch.check(result["train_s"], 60, "training")
    assert "samples/s" in first.stdout and f"run folder   {run}" in first.stdout
    with stopwatch.at_most(2):
        again = subprocess.run(["make", "setup"], cwd=clone, env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
