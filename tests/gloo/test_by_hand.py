"""The main job from what `muster render` prints, pasted into a shell."""

from __future__ import annotations

import subprocess
from pathlib import Path

from muster_runs import Run, environment, muster
from paths import ROOT


def test_what_render_prints_trains(tmp_path: Path) -> None:
    runs = tmp_path / "my runs"
    words = ("jobs/digits.yaml", f"runs={runs}", "train.steps=20", "parallel=single", "device=cpu")
    rendered = muster("render", *words, cwd=ROOT).stdout
    assert not runs.exists()
    done = subprocess.run(
        ["bash", "-e"], input=rendered, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run(runs / "digits-ID")
    assert (run.status()["state"], run.status()["step"]) == ("done", 20)
    assert muster("render", *words, cwd=ROOT).stdout == rendered  # also when that folder is there
    more = muster("run", run.folder, "train.steps=30", cwd=ROOT)
    assert more.returncode == 0 and "training from step 20 to 30" in more.stdout, more.stdout + more.stderr
