"""Ranks that somebody else starts, and scripts that expect what somebody else gives them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from muster_runs import HERE, environment, muster, result, submitted

from trainer.errors import FAILED, WRONG_JOB

TORCHRUN = Path(sys.executable).with_name("torchrun")
SCRIPT = """
import argparse, os
import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("--value", type=float, required=True)
parser.add_argument("--name", default="")
options = parser.parse_args()
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
total = torch.full((1,), options.value, device="cuda" if torch.cuda.is_available() else "cpu")
dist.all_reduce(total)
print("the sum is", total.item(), "for", options.name)
dist.destroy_process_group()
"""


def test_ranks_of_torchrun(tmp_path: Path) -> None:
    """They train as ours do, and the run can be looked at."""
    keys = ["devices_per_node=2", f"runs={tmp_path}", "train.steps=5", "name=outside"]
    command = [TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "trainer", HERE / "faulty.yaml", *keys]
    done = subprocess.run(
        list(map(str, command)), cwd=HERE, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("samples/s") == 1, done.stdout
    [run] = tmp_path.glob("outside-*")
    status = muster("status", run)
    assert status.returncode == 0 and "done" in status.stdout, status.stdout + status.stderr
    again = muster("run", run, "train.steps=7")
    assert again.returncode == 0 and "training from step 5 to 7" in again.stdout, again.stdout


@pytest.mark.parametrize("order, shown, code", [
    ("raise", "KeyError: 'no such digit'", FAILED), ("job error", "ERROR: task_args.width=7: does not fit", WRONG_JOB),
])  # fmt: skip
def test_a_rank_of_torchrun_that_fails(tmp_path: Path, order: str, shown: str, code: int) -> None:
    """It ends at once, although its peer waits for it, and says why once."""
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders/rank-1").write_text(order)
    command = [TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "trainer", HERE / "faulty.yaml", "train.steps=5"]
    done = subprocess.run(
        list(map(str, command)), cwd=HERE, env=environment() | {"MUSTER_RUN": str(tmp_path)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.count(shown) == 1, done.stdout
    assert re.search(rf"rank +: 1 .*\n.*exitcode +: {code} ", done.stdout), done.stdout


def test_a_script_as_it_is_written_for_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "sum it.py"
    script.write_text(SCRIPT)
    keys = ["task=null", f"script='{script}'", "script_args=[--value, 1.5, --name, 'two words']", "devices_per_node=2"]
    with submitted(tmp_path, *keys) as run:
        assert result(run) == 0, run.log("rank-0.log")
        for rank in range(2):
            assert "the sum is 3.0 for two words" in run.log(f"rank-{rank}.log")
