"""From the command to the first step on the test cluster: once through `muster submit`, once written by hand."""

import json
import re
import sys
import time
from pathlib import Path

from paths import ROOT, SUPPORT
from slurm_cluster import Cluster
from slurm_runs import submit

BY_HAND = f"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2
srun --ntasks-per-node=2 {sys.executable} {SUPPORT / "bare_digits.py"} \\
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
