"""Containers on another machine: a real sshd, and behind it the engine, which only a log-in there finds."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_runs import Runs
from login_host import SSHD, Laptop, LoginHost
from muster_runs import wait_for


@pytest.fixture
def laptop(runs: Runs, tmp_path: Path) -> Iterator[Laptop]:
    if not os.path.exists(SSHD):
        pytest.skip("no sshd: apt-get install openssh-server")
    host = LoginHost(tmp_path / "login", "", tmp_path / "here")
    names = ("PATH", "DOCKER_HOST", "DOCKER_CONFIG")
    exports = "".join(f"export {name}='{runs.engine.env[name]}'\n" for name in names)
    host.home.joinpath(".bash_profile").write_text(exports)
    yield Laptop(host, tmp_path / "here", "docker")
    host.stop()


def test_a_run_in_containers_of_another_machine(laptop: Laptop, runs: Runs) -> None:
    image = runs.site.read_text().split()[1]
    site = laptop.host.site(image=image)
    run = laptop.submit("nodes=2", "devices_per_node=1", "train.steps=20", "task_args.step_s=0.01", site=site)
    wait_for("its end", lambda: laptop.status(run)["state"] == "done")
    there = laptop.there(run)
    assert there.is_relative_to(laptop.host.home)
    assert (run / "metrics.jsonl").read_bytes() == (there / "metrics.jsonl").read_bytes()
    assert "attempt 0 begins" in laptop.must("logs", run)
    refused = laptop.muster("submit", "job.yaml", "--on", "docker", "--site", laptop.host.site(image="nowhere/none"))
    assert refused.returncode == 64 and "is not on this machine" in refused.stderr
    assert len(list((laptop.project / "runs").glob("*/"))) == 1
