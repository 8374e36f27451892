"""The main job in containers: every shape, and by hand from what `muster render` prints."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from docker_runs import Runs, events, same_weights, until
from engine_image import ROOT

pytestmark = pytest.mark.timeout(600)  # the first test of a session may have to make everything

PAIR = ("nodes=2", "devices_per_node=1")


@pytest.mark.parametrize("shape", [("parallel=single",), ("parallel=dp",), PAIR], ids=["single", "dp", "two nodes"])
def test_the_main_job_trains(runs: Runs, shape: tuple[str, ...]) -> None:
    run = runs.submit(*shape, "train.epochs=4")
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
        ["sh"], input=rendered, cwd=ROOT, env=runs.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    by_hand: Path = runs.folder / "runs" / "digits-ID"
    until(lambda: (by_hand / "result.json").exists(), by_hand)
    assert runs.wait_end(reference)["state"] == "done"
    assert same_weights(by_hand, reference)


def test_runs_of_a_sweep_take_turns(runs: Runs) -> None:
    words = runs.words("parallel=single", "train.steps=6", "device=cpu")
    done = runs.muster("submit", *words, "--sweep", "train.lr=0.01,0.001")
    first, second = (Path(line) for line in done.stdout.splitlines())
    assert [runs.wait_end(run)["state"] for run in (first, second)] == ["done", "done"]
    assert events(second, "wired")[0]["time"] > events(first, "done")[0]["time"]
    (sweep,) = first.parent.glob("*-sweep-*")
    listed = json.loads(runs.muster("list", sweep, "--json").stdout)["runs"]
    assert [(run["value"], run["platform"]) for run in listed] == [("0.01", "docker"), ("0.001", "docker")]
