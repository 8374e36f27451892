"""Nodes without a shared volume: each has a run folder of its own, only node 0's has checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.record import read_lines

ROOT = Path(__file__).parents[2]
JOB = ["nodes=2", "devices_per_node=1", "device=cpu", "train.batch_size=64", "train.epochs=6", "checkpoint.every_steps=5"]


def start(folder: Path, node: int, *overrides: str) -> subprocess.Popen[bytes]:
    """One agent, as a pod without a claim has it."""
    run = folder / f"node-{node}"
    variables = {
        "MUSTER_PLATFORM": "local", "MUSTER_JOB_ID": folder.name, "MUSTER_NODES": "2", "MUSTER_NODE_RANK": str(node),
        "MUSTER_HOSTNAMES": "127.0.0.1,127.0.0.2", "MUSTER_RUN": str(run), "MUSTER_RUN_SHARED": "0",
        "MUSTER_TERMINATION_LOG": str(folder / f"word-{node}"),
    }  # fmt: skip
    with (folder / f"out-{node}").open("ab") as out:
        command = [sys.executable, "-m", "trainer", "jobs/digits.yaml", *JOB, *overrides]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=out, stderr=out)


def wait_for(folder: Path, event: str, count: int = 1) -> list[dict[str, Any]]:
    """The events of that name in node 0's folder, once there are so many."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [line for line in read_lines(folder / "node-0" / "events.jsonl") if line["event"] == event]
        if len(found) >= count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {event} within 60 s: {(folder / 'out-0').read_text()[-2000:]}")


def loss_curve(folder: Path) -> dict[int, float]:
    lines = read_lines(folder / "node-0" / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.parametrize("victim", ["rank", "agent"])
def test_a_lost_rank_or_node_gets_the_checkpoint_of_rank_0(tmp_path: Path, victim: str) -> None:
    """Of node 1: node 0 has the checkpoints, and hands them over."""
    agents = [start(tmp_path, node) for node in range(2)]
    try:
        wait_for(tmp_path, "checkpoint", 3)
        if victim == "rank":
            ranks = [line for line in read_lines(tmp_path / "node-1" / "events.jsonl") if line["event"] == "ranks"]
            os.kill(ranks[-1]["pids"]["1"], signal.SIGKILL)
        else:
            agents[1].kill()
            agents[1].wait()
            agents[1] = start(tmp_path, 1)
        assert wait_for(tmp_path, "resume")[0]["step"] >= 15
        assert [agent.wait(60) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    assert "accuracy" in (tmp_path / "word-0").read_text()
    printed = (tmp_path / "out-1").read_text()
    assert "the run folder goes with this node" in printed
    whole = tmp_path / "whole"
    whole.mkdir()
    undisturbed = [start(whole, node) for node in range(2)]
    assert [agent.wait(60) for agent in undisturbed] == [0, 0]
    assert loss_curve(tmp_path) == loss_curve(whole)


def test_every_rank_prints_what_would_be_lost(tmp_path: Path) -> None:
    agents = [start(tmp_path, node, "task=trainer.tasks.nobody:X") for node in range(2)]
    assert [agent.wait(60) for agent in agents] == [64, 64]
    agents = [start(tmp_path, node, "train.steps=2", "train.on_nan=halt", "train.lr=1e30") for node in range(2)]
    codes = [agent.wait(60) for agent in agents]
    assert codes[0] == codes[1]
    assert json.loads((tmp_path / "node-0" / "failure.json").read_text())["reason"] if codes[0] else True
