"""`muster run` and `muster submit` as commands: what they start, what they leave, and what they were started with."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from muster_runs import HERE, MUSTER, Run, command_line, environment, muster, processes_of, submitted, wait_for

SOON_S = 3.0


@pytest.fixture
def mark() -> Iterator[str]:
    """A word in the environment of all that a command starts; whatever is left of that at the end is killed."""
    word = uuid.uuid4().hex
    yield word
    for pid in processes_of(word):
        os.kill(pid, signal.SIGKILL)


def start(mark: str, *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [MUSTER, "run", *map(str, words)], cwd=HERE, env=environment(MARK=mark), text=True, stderr=subprocess.PIPE
    )


def test_a_refused_job_leaves_nothing(mark: str, tmp_path: Path) -> None:
    process = start(mark, "faulty.yaml", f"runs={tmp_path}", "train.stepz=5")
    _, said = process.communicate(timeout=SOON_S)
    assert process.returncode == 64
    assert said.startswith("ERROR: train.stepz=5: ") and len(said.splitlines()) == 1
    wait_for("the end of what was started", lambda: not processes_of(mark), SOON_S)
    assert not list(tmp_path.iterdir())


def test_ps_shows_which_run_a_process_belongs_to(tmp_path: Path) -> None:
    with submitted(tmp_path, "train.steps=1000000", "task_args.step_s=0.01") as run:
        run.wait("first_step")
        for pid in (run.status()["handle"]["pid"], *run.agents().values()):
            assert str(run.folder).encode() in command_line(pid)


def test_who_reads_the_output_of_submit_does_not_wait_for_the_run(mark: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [MUSTER, "submit", "faulty.yaml", f"runs={tmp_path}", "train.steps=500", "task_args.step_s=0.01"], cwd=HERE,
        env=environment(MARK=mark), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.wait() == 0
    began = time.monotonic()
    assert process.stdout.read().startswith(str(tmp_path))
    assert time.monotonic() - began < 0.4
    (run,) = tmp_path.iterdir()
    Run(run).wait("training")


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_command_without_a_standard_file(mark: str, tmp_path: Path, closed: int) -> None:
    process = subprocess.Popen(
        [MUSTER, "run", "faulty.yaml", f"runs={tmp_path}", "train.steps=3"], cwd=HERE, env=environment(MARK=mark),
        preexec_fn=lambda: os.close(closed),
    )  # fmt: skip
    assert process.wait(60) == 0
    (run,) = tmp_path.iterdir()
    assert Run(run).events("done")


def test_what_an_import_prints_is_in_the_log(mark: str, tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("import sys; print('an old driver', file=sys.stderr); raise ImportError\n")
    words = [MUSTER, "run", "faulty.yaml", f"runs={tmp_path / 'runs'}", "train.steps=3"]
    variables = environment(MARK=mark)
    variables["PYTHONPATH"] += f":{tmp_path}"
    done = subprocess.run(words, cwd=HERE, env=variables, capture_output=True, text=True, check=True)
    assert "an old driver" not in done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("*-*")
    assert "an old driver" in Run(run).log("node-0.log")


def test_ranks_do_not_import_from_where_the_command_was_typed(mark: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "say.py").write_text("import pathlib, sys; pathlib.Path('said').write_text('\\n'.join(sys.path))\n")
    (first / "say.yaml").write_text("script: say.py\n")
    assert muster("run", "say.yaml", "runs=runs", cwd=first).returncode == 0
    (first / "said").unlink()
    (run,) = (first / "runs").glob("*-*")
    assert muster("run", run, cwd=second).returncode == 0
    assert str(second) not in (first / "said").read_text().splitlines()
