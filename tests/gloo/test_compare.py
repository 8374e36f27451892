"""`muster compare` as a user calls it: real runs of the main job in all modes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from muster_runs import environment
from paths import MUSTER, ROOT


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MUSTER, "compare", *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment(),
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_the_digits_in_all_modes(tmp_path: Path) -> None:
    done = compare("jobs/digits.yaml", f"runs={tmp_path}", "device=cpu", "--steps", 20, "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    folder = Path(found["folder"])
    assert json.loads((folder / "compare.json").read_text()) == found
    assert (folder / "compare.png").exists() or "no plot without matplotlib" in done.stderr
    assert list(found["modes"]) == ["single", "dp", "ddp"]
    for mode, item in found["modes"].items():
        assert item["samples_per_s"] > 0 and len(item["rounds"]) == 1
        assert [device["rank"] for device in item["peak_memory_mb"]] == ([0, 1] if mode == "ddp" else [0])
    assert found["communication"]["step_without_ms"] > 0
    assert found["losses"]["equal"] and found["losses"]["steps"] == 30, found["losses"]
    assert found["winner"] is None and "--rounds 3" in found["verdict"], "one round says nothing about noise"
    runs = [path for path in (folder / "runs").iterdir() if (path / "result.json").exists()]
    assert len(runs) == 4 and not any((run / "checkpoints").exists() for run in runs)


def test_a_mode_that_fails_ends_the_comparison_with_its_code(tmp_path: Path) -> None:
    words = ("task_args.width=-1", f"runs={tmp_path}", "device=cpu", "--steps", 5)
    done = compare("jobs/digits.yaml", *words)
    assert done.returncode not in (0, 75)
    assert "round 1 of 3, single: failed" in done.stderr
