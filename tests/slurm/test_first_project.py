"""docs/getting-started.md is true: its project trains on a cluster that only ssh reaches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import first_project
import pytest
from login_host import SSHD, LoginHost
from muster_runs import wait_for
from slurm_cluster import Cluster
from slurm_config import CONTROLLER

from trainer.records import read_json
from trainer.run.folder import RunFolder


@pytest.fixture
def host(slurm: Cluster, shared_path: Path, tmp_path: Path) -> Iterator[LoginHost]:
    """A host that does not see the folder of the project."""
    if not os.path.exists(SSHD):
        pytest.skip("no sshd: apt-get install openssh-server")
    enter = f"nsenter --target {slurm.pids[CONTROLLER]} --mount --net --uts --ipc"
    found = LoginHost(shared_path / "login", enter, tmp_path)
    yield found
    found.stop()


def test_the_project_of_the_page(host: LoginHost, tmp_path: Path) -> None:
    project = first_project.make(tmp_path, host.environment())
    site = project / "slurm/site.yaml"
    site.write_text(site.read_text() + host.site().read_text())
    ((submit, status),) = first_project.blocks("On a cluster with Slurm")
    first_project.type_command(project, f"{submit} device=cpu train.epochs=1", host.environment())
    run = RunFolder(first_project.newest(project))

    def is_done() -> bool:
        said = first_project.type_command(project, status, host.environment())
        assert "failed" not in said, said
        return "done" in said

    wait_for("the end", is_done)
    assert (read_json(run.result) or {}).get("metrics", {}).get("accuracy", 0) > 0.5
