"""docs/getting-started.md is true: its project is made, trained, killed and looked at as the page says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import first_project
import pytest
from muster_runs import Run, end_all, stat, wait_for

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """Its runs are ended at the end."""
    yield first_project.make(tmp_path, dict(os.environ))
    end_all(Run(tmp_path / "digits/runs"))


def test_the_project_of_the_page(project: Path) -> None:
    def type_command(command: str) -> str:
        return first_project.type_command(project, command, dict(os.environ))

    ((train,), (submit, kill, status, cancel)) = first_project.blocks("Here")
    assert "accuracy" in type_command(f"{train} device=cpu train.epochs=1")
    type_command(f"{submit} device=cpu")
    run = Run(first_project.newest(project))
    run.wait("checkpoint")
    (fork_server,) = {stat(pid)[1] for pid in run.ranks().values()}
    type_command(kill.replace("pgrep", f"pgrep --parent {fork_server}"))  # no other run of this machine may be hit
    resume = run.wait("resume")
    assert resume["folder"] == "memory" and resume["step"] > 0
    run.wait("ranks", 2)
    assert "running" in type_command(status)
    type_command(cancel)
    wait_for("the end", (run.folder / "exit.json").exists)
    assert run.status()["state"] == "cancelled"
    ((listing, plot),) = first_project.blocks("What came out")
    assert run.folder.name in type_command(listing)
    type_command(plot)
