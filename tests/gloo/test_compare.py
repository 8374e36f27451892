"""`muster compare` as a user calls it: real runs of the main job in all modes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from muster_runs import FULL, environment
from paths import MUSTER, ROOT

from trainer.launch.compare.verdict import MODES
from trainer.tasks.digits import Digits


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MUSTER, "compare", *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment(),
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_the_digits_in_all_modes(tmp_path: Path) -> None:
    modes = [word for mode in ("dp", "server") for word in ("--mode", mode)]
    words = ("devices_per_node=3", "train.batch_size=60", "pipeline.microbatches=4", f"runs={tmp_path}", "device=cpu")
    done = compare("jobs/digits.yaml", *words, "--steps", 20, "--rounds", 1, "--json", *([] if FULL else modes))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    folder = Path(found["folder"])
    assert json.loads((folder / "compare.json").read_text()) == found
    assert (folder / "compare.png").exists() or "no plot without matplotlib" in done.stderr
    some = ["single", "dp", "ddp", "server"]
    assert list(found["modes"]) == (list(MODES) if FULL else some) and not found["refused"]
    for mode, item in found["modes"].items():
        ranks = [0] if mode in ("single", "dp") else [0, 1, 2]
        assert item["samples_per_s"] > 0 and len(item["rounds"]) == 1
        assert [device["rank"] for device in item["peak_memory_mb"]] == ranks
        assert len(item["bytes_per_step"]) == len(ranks)
    gradients = 4 * sum(weight.numel() for weight in Digits().model().parameters())
    ring, server = (found["modes"][mode]["bytes_per_step"] for mode in ("ddp", "server"))
    # In a ring each of N ranks sends and receives (N - 1) / N of the gradients twice; a server all of them N - 1 times.
    assert ring == pytest.approx([2 * 2 * gradients * 2 / 3] * 3, rel=0.1)
    assert server == pytest.approx([4 * gradients, 2 * gradients, 2 * gradients], rel=0.1)
    assert found["communication"]["step_without_ms"] > 0
    assert found["losses"]["equal"] and found["losses"]["steps"] == 30, found["losses"]
    assert found["winner"] is None and "--rounds 3" in found["verdict"], "one round says nothing about noise"
    runs = [path for path in (folder / "runs").iterdir() if (path / "result.json").exists()]
    assert len(runs) == len(found["modes"]) + 1 and not any((run / "checkpoints").exists() for run in runs)


def test_a_mode_that_fails_ends_the_comparison_with_its_code(tmp_path: Path) -> None:
    words = ("task_args.width=-1", f"runs={tmp_path}", "device=cpu", "--steps", 5)
    done = compare("jobs/digits.yaml", *words)
    assert done.returncode not in (0, 75)
    assert "round 1 of 3, single: failed" in done.stderr
