"""The benches' quick variants: generous gates, on ratios alone, that a regression of speed does not pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

BENCH = ROOT / "bench"

pytestmark = pytest.mark.speed


def run(*words: str | Path, **variables: str) -> str:
    """Run a bench; return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=280, env=os.environ | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", ["loop", "launch", "recovery", "checkpoint"])
def test_it_is_not_slower_than_its_gate(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(BENCH / f"{name}.py", "--quick")
    with capsys.disabled():
        print(f"\n{printed}", end="")


def test_the_bench_of_a_gpu_needs_one(tmp_path: Path) -> None:
    assert "skipped: no CUDA GPU" in run(BENCH / "gpu.py", CUDA_VISIBLE_DEVICES="")
    output = tmp_path / "gpu.json"
    small = ["--device", "cpu", "--size", "1m", "--batch", "2", "--rounds", "1", "--block", "0.1"]
    assert "no MFU" in run(BENCH / "gpu.py", *small, "--configurations", "float32", "--output", output)
    assert json.loads(output.read_text())["machine"]["cpus"]
