"""Scripts on a session, each the only node of a run, with what strikes them: see `struck.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from muster_runs import HERE, Run, environment

from trainer.errors import DONE


def train_struck(
    folder: Path, plan: str, script: Path, words: tuple[str, ...], *keys: str, code: int = DONE,
    base: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """Train in `folder`, or go on there, as the agent of one node; return what was printed. `base`: its environment."""
    arguments = [str(folder / "strikes"), plan, str(script), *words]
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "trainer",
        str(HERE / "sessions.yaml"),
        f"script_args={json.dumps(arguments)}",
        *keys,
    ]
    variables = {"MUSTER_RUN": str(folder), "MUSTER_JOB_ID": Run(folder).job_id}
    done = subprocess.run(
        command, cwd=HERE, env=(environment() if base is None else base) | variables, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-5000:]
    return done.stdout
