"""How long a user waits from the command to the first step, beside what Slurm and PyTorch take by themselves."""

import json
import re
import statistics
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import ROOT, submit

PAIRS = 2
BY_HAND = f"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2
srun --ntasks-per-node=2 {sys.executable} {Path(__file__).with_name("bare_digits.py")} \\
  "$(scontrol show hostnames | head -1)"
"""


def by_muster(slurm: Cluster, folder: Path) -> float:
    begin = time.time()
    run = submit(folder, "nodes=2", "train.epochs=1", "log.every_steps=1", job="jobs/digits.yaml")
    run.wait_end()
    return float(json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])["time"]) - begin


def by_hand(slurm: Cluster, folder: Path) -> float:
    script, output = folder / "by_hand.sbatch", folder / "by_hand.out"
    script.write_text(BY_HAND)
    begin = time.time()
    job = slurm.sbatch(f"--output={output}", f"--chdir={ROOT}", script, env={"PYTHONPATH": str(ROOT)})
    slurm.wait(job, "COMPLETED")
    found = re.search(r"first step: (\S+)", output.read_text())
    assert found
    return float(found[1]) - begin


def test_the_first_step_comes_as_soon_as_with_bare_srun(
    slurm: Cluster, shared_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes with two ranks each, in turn."""
    pairs = [(by_muster(slurm, shared_path), by_hand(slurm, shared_path)) for _ in range(PAIRS)]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    with capsys.disabled():
        times = ", ".join(f"{ours:.1f} s and {theirs:.1f} s" for ours, theirs in pairs)
        print(f"\nfrom the command to the first step, muster submit and bare sbatch: {times}; ratio {ratio:.2f}")
    assert ratio <= 1.15
