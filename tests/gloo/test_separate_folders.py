"""Nodes without a shared volume: each has a run folder of its own, only node 0's has checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from muster_runs import Run
from paths import ROOT

from trainer.records import read_lines
from trainer.run.folder import RunFolder

JOB = ["nodes=2", "devices_per_node=1", "device=cpu", "train.steps=40", "checkpoint.every_steps=5"]


def start(folder: Path, node: int, job: Path | None = None) -> subprocess.Popen[bytes]:
    """One agent, as a pod without a claim has it."""
    run = folder / f"node-{node}"
    variables = {
        "MUSTER_PLATFORM": "local", "MUSTER_JOB_ID": Run(folder).job_id, "MUSTER_NODES": "2",
        "MUSTER_NODE_RANK": str(node), "MUSTER_HOSTNAMES": "127.0.0.1,127.0.0.2",
        "MUSTER_RUN": str(run), "MUSTER_RUN_SHARED": "0",
        "MUSTER_TERMINATION_LOG": str(folder / f"word-{node}"),
        "MUSTER_SECRET": "0123456789abcdef" * 4,  # there is no folder where they could agree on one
    }  # fmt: skip
    with (folder / f"out-{node}").open("ab") as out:
        words = [str(job)] if job else ["jobs/digits.yaml", *JOB]
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", *words], cwd=ROOT, env=os.environ | variables, stdout=out, stderr=out
        )


def wait_for(folder: Path, event: str, count: int = 1) -> list[dict[str, Any]]:
    """The events of that name in node 0's folder, once there are so many."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = [line for line in RunFolder(folder / "node-0").read_events() if line["event"] == event]
        if len(found) >= count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {event} within 120 s: {(folder / 'out-0').read_text()[-2000:]}")


def loss_curve(folder: Path) -> dict[int, float]:
    lines = read_lines(folder / "node-0" / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    agents = [start(folder, node) for node in range(2)]
    assert [agent.wait(120) for agent in agents] == [0, 0]
    return loss_curve(folder)


@pytest.mark.parametrize("victim", ["rank", "agent"])
def test_a_lost_rank_or_node_gets_the_checkpoint_of_rank_0(
    tmp_path: Path, victim: str, undisturbed: dict[int, float]
) -> None:
    """Of node 1: node 0 has the checkpoints, and hands them over."""
    agents = [start(tmp_path, node) for node in range(2)]
    try:
        wait_for(tmp_path, "checkpoint", 2)
        if victim == "rank":
            ranks = [line for line in RunFolder(tmp_path / "node-1").read_events() if line["event"] == "ranks"]
            os.kill(ranks[-1]["pids"]["1"], signal.SIGKILL)
        else:
            agents[1].kill()
            agents[1].wait()
            agents[1] = start(tmp_path, 1)
        assert wait_for(tmp_path, "resume")[0]["step"] >= 10
        assert [agent.wait(120) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    assert "accuracy" in (tmp_path / "word-0").read_text()
    assert loss_curve(tmp_path) == undisturbed


def test_each_node_says_so_and_prints_the_logs_of_its_ranks(tmp_path: Path) -> None:
    script = tmp_path / "hello.py"
    script.write_text("import os\nprint('hello from', os.environ['RANK'])\n")
    job = tmp_path / "job.yaml"
    job.write_text(f"name: hello\nscript: {script}\nnodes: 2\ndevices_per_node: 2\ndevice: cpu\n")
    agents = [start(tmp_path, node, job=job) for node in range(2)]
    assert [agent.wait(120) for agent in agents] == [0, 0]
    for node, ranks in enumerate([(0, 1), (2, 3)]):
        printed = (tmp_path / f"out-{node}").read_text()
        assert "the run folder goes with this node" in printed
        assert all(f"hello from {rank}" in printed for rank in ranks)
