"""The pages' commands for Slurm, typed in a copy of the project that the cluster sees, on a real one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import documents
import pytest
from slurm_cluster import Cluster
from slurm_runs import Run


@pytest.mark.parametrize("command", documents.commands("slurm"))
def test_a_command_for_slurm(slurm: Cluster, shared_path: Path, command: str) -> None:
    project = documents.copy_project(shared_path / "muster")
    (project / "my-site.yaml").write_text("cpus_per_device: 1\n")
    # The hosts of the tests have four GPUs, which are only files, and one or two devices are enough.
    command = command.replace("=8", "=2")
    done = subprocess.run(
        ["bash", "-c", documents.shortened(command, *documents.SHORT)], cwd=project, capture_output=True, text=True,
        env=documents.variables(project, PATH=f"{project}/.venv/bin:{slurm.path}"), timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    job = re.match(r"Submitted batch job (\d+)", done.stdout)
    if job:
        assert slurm.wait(job[1])["JobState"] == "COMPLETED"
        return
    lines = [line.removeprefix("run folder: ") for line in done.stdout.splitlines()]
    runs = [Run(Path(line)) for line in lines if Path(line, "job.yaml").exists()]
    assert len(runs) == (2 if "--sweep" in command else 1), done.stdout
    for run in runs:
        assert run.wait_end()["state"] == "done", run.describe()
