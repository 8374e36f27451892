"""`python -m trainer --explain JOB`: how this node would be wired, and what is wrong with it; nothing is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from muster_runs import environment
from paths import ROOT

SECRET = "0123456789abcdef" * 4
NODE_1_OF_2 = {
    "MUSTER_PLATFORM": "local", "MUSTER_JOB_ID": "digits-1", "MUSTER_NODES": "2", "MUSTER_NODE_RANK": "1",
    "MUSTER_HOSTNAMES": "127.0.0.1,127.0.0.2",
}  # fmt: skip


def explain(folder: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, in an empty folder, which stays empty."""
    command = [sys.executable, "-m", "trainer", "--explain", str(ROOT / "jobs/digits.yaml"), *overrides]
    done = subprocess.run(
        command, cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=400
    )
    assert list(folder.iterdir()) == []
    return done


@pytest.mark.parametrize(
    ("variables", "rows"),
    [
        ({}, ["platform alone", "no scheduler variable", "GLOO_SOCKET_IFNAME=lo (one node:"]),
        (NODE_1_OF_2, ["export MUSTER_SECRET=$(openssl rand -hex 32)"]),
        (NODE_1_OF_2 | {"MUSTER_SECRET": SECRET}, ["secret given MUSTER_SECRET in the environment"]),
        (NODE_1_OF_2, ["platform local MUSTER_PLATFORM", "node_rank 1 submitit, MUSTER_NODE_RANK",
                       "master_addr 127.0.0.1 submitit's", "NCCL_SOCKET_IFNAME==lo (simulated nodes"]),
    ],
    ids=["by hand", "no secret", "a secret", "one of two"],
)  # fmt: skip
def test_each_value_has_its_source(tmp_path: Path, variables: dict[str, str], rows: list[str]) -> None:
    done = explain(tmp_path, *(["nodes=2"] if variables else []), **variables)
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert [row for row in rows if row not in text] == [] and SECRET not in text


def test_what_would_stop_the_job_is_said(tmp_path: Path) -> None:
    done = explain(tmp_path, "device=cuda", "devices_per_node=99", "train.batch_size=99")
    assert done.returncode == 64
    assert "ERROR [config] devices_per_node=99 with device=cuda" in done.stdout
    assert "WARNING [config] 99 ranks share" in done.stdout


def test_a_contradiction_is_one_line(tmp_path: Path) -> None:
    done = explain(tmp_path, "nodes=4", **NODE_1_OF_2)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (64, "", 1)
    assert "nodes=4" in done.stderr
