"""A script with a session trains the same, whatever number of ranks, micro-batches and kills, and wherever data are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from muster_runs import HERE, muster
from states import read_state

KINDS = {
    "three micro-batches": ("map", 3, 1, []),
    "three ranks, of which one has nothing to do in the last batch": ("map", 1, 5, []),
    "two ranks, two micro-batches, killed": ("map", 2, 2, [3, 20, 21]),
    "a stream, killed": ("stream", 1, 2, [7, 30, 33]),
    "a stream that knows its place, killed": ("stateful", 1, 2, [7, 30, 33]),
}


def train(folder: Path, kind: str, accumulate: int, ranks: int, kills: list[int]) -> dict[str, Any]:
    """Run the script; return what it found."""
    folder.mkdir()
    words = [f"script_args=[{kind},{accumulate}{''.join(f',{step}' for step in kills)}]", f"devices_per_node={ranks}"]
    (folder / "job.yaml").write_text(f"script: {HERE / 'session_script.py'}\nlog: {{samples: true}}\n")
    if kind != "map":  # from exactly the step before, and from the disk
        words += ["checkpoint.every_steps=1", "checkpoint.in_memory=false"]
    done = muster("run", "job.yaml", *words, "agent.restarts=9", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = (folder / "runs").glob("*/found.json")
    found: dict[str, Any] = json.loads(run.read_text())
    return {**found, "run": run.parent, "log": done.stdout}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By one rank, in whole batches, undisturbed."""
    return train(tmp_path_factory.mktemp("single") / "run", "map", 1, 1, [])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights(tmp_path: Path, single: dict[str, Any], kind: str) -> None:
    found = train(tmp_path / "run", *KINDS[kind])
    assert found["weights"] == pytest.approx(single["weights"], abs=1e-12, rel=1e-12)
    assert found["evaluation"] == pytest.approx(single["evaluation"], abs=1e-12)
    assert used(found["run"]) == used(single["run"])
    names = list(read_state(found["run"])["model"])
    assert names == list(read_state(single["run"])["model"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    if KINDS[kind][0] == "map":
        kills, opened = len(KINDS[kind][3]), tmp_path / "run/opened.txt"
        assert found["log"].count("resumed from memory") == kills and not opened.exists()
    else:
        text = {"stream": "Stream reads again the ", "stateful": "Stateful goes on by its state_dict"}
        assert text[KINDS[kind][0]] in found["log"], found["log"]


def used(run: Path) -> dict[tuple[int, int], list[int]]:
    """The samples of each (epoch, step): what its last attempt used, from all ranks."""
    found: dict[tuple[int, int], dict[int, list[int]]] = {}
    for file in sorted(run.glob("samples-rank*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            step = found.setdefault((line["epoch"], line["step"]), {})
            if line["attempt"] > max(step, default=-1):
                step.clear()
            if line["attempt"] == max(step, default=line["attempt"]):
                step.setdefault(line["attempt"], []).extend(line["samples"])
    return {key: sorted(next(iter(step.values()))) for key, step in found.items()}
