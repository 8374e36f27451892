"""Sweeps on this machine: the runs take turns, are compared at the end, and can be stopped together."""

from __future__ import annotations

import json
from pathlib import Path

from muster_runs import Run, end_all, muster, wait_for
from paths import ROOT, SUPPORT

KEYS = ("device=cpu", "devices_per_node=1", "nodes=1", "log.tensorboard=false")


def test_a_sweep_is_followed_to_its_result(tmp_path: Path) -> None:
    words = ("train.steps=4", "checkpoint.best=loss", "checkpoint.best_mode=min", "--sweep", "train.lr=0.03,0.00001")
    done = muster("run", ROOT / "jobs/digits.yaml", f"runs={tmp_path}", *KEYS, *words)
    assert done.returncode == 0, done.stderr
    (sweep,) = tmp_path.glob("digits-sweep-*")
    found = json.loads((sweep / "sweep.json").read_text())
    assert (found["key"], found["values"]) == ("train.lr", ["0.03", "0.00001"])
    first, second = (Run(Path(run)) for run in found["runs"])
    assert second.events("wired")[0]["time"] > first.events("done")[0]["time"], "one after the other"
    assert f"run folder: {second.folder}  train.lr=0.00001" in done.stdout
    head, *rows, last = done.stdout.splitlines()[-4:]
    assert head.split()[:4] == ["train.lr", "state", "step", "loss"] and last == "best by loss: the smallest"
    assert [(row.split()[0], row.split()[1], " best " in row) for row in rows] == [
        ("0.03", "done", True), ("0.00001", "done", False),
    ]  # fmt: skip


def test_runs_wait_for_the_earlier_ones_and_are_cancelled_together(tmp_path: Path) -> None:
    words = ("--sweep", "train.lr=0.1,0.01,0.001")
    done = muster("submit", SUPPORT / "slow.yaml", f"runs={tmp_path}", *KEYS, *words)
    assert done.returncode == 0 and not done.stderr, done.stderr
    runs = [Run(Path(line)) for line in done.stdout.splitlines()]
    (sweep,) = tmp_path.glob("slow-sweep-*")
    try:
        runs[0].wait("first_step")
        runs[2].wait("pending")
        told = [runs[index].status() for index in (0, 1, 2)]
        assert [each["state"] for each in told] == ["running", "pending", "pending"]
        assert all(f"waiting for {runs[0].folder.name}, " in each["reason"] for each in told[1:])
        assert muster("cancel", runs[1].folder).returncode == 0
        wait_for("the end of one that waited", lambda: runs[1].status()["state"] == "cancelled")
        assert [run.status()["state"] for run in runs] == ["running", "cancelled", "pending"]
        assert muster("cancel", sweep).returncode == 0
        wait_for("the end of all", lambda: all(run.status()["state"] == "cancelled" for run in runs))
        assert not runs[2].events("wired"), "none took the turn of one that was stopped"
    finally:
        for run in runs:
            end_all(run)
