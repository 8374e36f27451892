"""README's first screen and its Python, as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch
from muster_runs import followed
from states import read_state

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_a_rank_is_killed(tmp_path: Path) -> None:
    """By both commands, save that no other run of this machine may be hit, and that the environment is there."""
    (keys,) = re.findall(r"^make train ARGS=(\S+) .*two ranks", README, re.M)
    (pattern,) = re.findall(r"^kill -9 \$\(pgrep --newest --full '(.*)'\)", README, re.M)
    folder = tmp_path / "runs"
    with followed(tmp_path, ROOT / "jobs/digits.yaml", *shlex.split(keys), f"runs={folder}", "device=cpu") as (run, _):
        run.wait("first_step")
        run.wait("checkpoint")
        command = ["pgrep", "--newest", "--full", f"{folder}/{pattern}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert int(found) in run.ranks().values()
        subprocess.run(["kill", "-9", *found.split()], check=True)
        resume = run.wait("resume")
        assert resume["folder"] == "memory" and resume["step"] > 0


def test_a_checkpoint_is_plain_pytorch(tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    words = [ROOT / "jobs/digits.yaml", f"runs={tmp_path}", "device=cpu"]
    with followed(tmp_path, *words) as (run, process):
        assert process.wait(120) == 0
        names: dict[str, Any] = {}
        exec(program.replace("runs/digits-...", str(run.folder)), names)
        saved = read_state(run.folder)["model"]
    loaded = names["model"].state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
