"""The main job in containers: every shape, and by hand from what `muster render` prints."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from docker_runs import Runs, same_weights, until
from engine_image import ROOT

pytestmark = pytest.mark.timeout(600)  # the first test of a session may have to make everything

PAIR = ("nodes=2", "devices_per_node=1")


def test_the_main_job_trains_on_one_node(runs: Runs) -> None:
    """As a sweep over the modes that need no other one."""
    done = runs.muster("submit", *runs.words("train.epochs=4"), "--sweep", "parallel=single,dp")
    for line in done.stdout.splitlines():
        check(runs, Path(line))
    (sweep,) = (runs.folder / "runs").glob("*-sweep-*")
    listed = json.loads(runs.muster("list", sweep, "--json").stdout)["runs"]
    assert [(run["value"], run["platform"], run["state"]) for run in listed] == [
        ("single", "docker", "done"), ("dp", "docker", "done"),
    ]  # fmt: skip


def test_the_main_job_trains_on_two_nodes(runs: Runs) -> None:
    check(runs, runs.submit(*PAIR, "train.epochs=4"))


def check(runs: Runs, run: Path) -> None:
    """It trained well, and left files of ours and no network."""
    status = runs.wait_end(run)
    assert status["state"] == "done", status
    assert status["metrics"]["accuracy"] > 0.9
    owner = (run / "result.json").stat()
    assert (owner.st_uid, owner.st_gid) == (os.getuid(), os.getgid())
    assert run.name not in runs.engine.docker("network", "ls", "--format", "{{.Name}}").stdout


def test_what_render_prints_is_the_same_job_by_hand(runs: Runs) -> None:
    reference = runs.submit(*PAIR, "train.steps=20", on="local")
    rendered = runs.muster("render", *runs.words(*PAIR, "train.steps=20")).stdout
    done = subprocess.run(
        ["sh"], input=rendered, cwd=ROOT, env=runs.environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    by_hand: Path = runs.folder / "runs" / "digits-ID"
    until(lambda: (by_hand / "result.json").exists(), by_hand)
    assert runs.wait_end(reference)["state"] == "done"
    assert same_weights(by_hand, reference)
