"""Ranks that somebody else starts, and scripts that expect what somebody else gives them."""

from __future__ import annotations

import json
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
        text=True, timeout=400,
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
        stderr=subprocess.STDOUT, text=True, timeout=400,
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


DUMP = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
(folder / os.environ["RANK"]).write_text(json.dumps(dict(os.environ)))
"""
OF_A_LAUNCH = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"}
"""Variables with other values in each launch."""
NOT_OURS = {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE", "_"}
"""Where torch's `record` writes, what torchrun's agent tells itself, and what a shell says."""


def test_a_rank_has_all_variables_that_torchrun_sets(tmp_path: Path) -> None:
    script = tmp_path / "dump.py"
    script.write_text(DUMP)
    for name in ("theirs", "ours"):
        words = [str(script), str(tmp_path / name)]
        if name == "theirs":
            command = [str(TORCHRUN), "--standalone", "--nproc-per-node=2", "--max-restarts=3", *words]
            subprocess.run(command, env=environment(), check=True, capture_output=True)
        else:
            keys = ["task=null", f"script={words[0]}", f"script_args=[{words[1]}]", f"runs={tmp_path / 'runs'}"]
            assert muster("run", HERE / "faulty.yaml", *keys).returncode == 0
    for rank in ("0", "1"):
        theirs, ours = (json.loads((tmp_path / name / rank).read_text()) for name in ("theirs", "ours"))
        same = theirs.keys() - OF_A_LAUNCH - NOT_OURS
        assert {name: ours.get(name) for name in same} == {name: theirs[name] for name in same}
        assert theirs.keys() - ours.keys() <= NOT_OURS
        [run] = (tmp_path / "runs").glob("*-*")
        assert ours["NCCL_DEBUG"] == "WARN"
        assert ours["TORCH_FR_DUMP_TEMP_FILE"].startswith(f"{run}/logs/") and ours["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
