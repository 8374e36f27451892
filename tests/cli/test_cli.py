"""`muster`: quick, without torch, and clear about a mistake on its command line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import MUSTER, ROOT

VERBS = ("run", "submit", "render", "status", "logs", "cancel", "preempt", "list")


def muster(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MUSTER, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that ended."""
    folder = tmp_path / "runs/digits-1"
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text("name: digits\n")
    (folder / "handle.json").write_text(json.dumps({"platform": "local", "pid": 1, "started": "0"}))
    (folder / "exit.json").write_text('{"code": 0}')
    events = [{"event": "submitted", "time": 1}, {"event": "training", "time": 2, "step": 0, "steps": 9}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_help_names_every_verb() -> None:
    done = muster("--help")
    assert done.returncode == 0
    assert [verb for verb in VERBS if verb not in done.stdout] == []
    assert "..." not in done.stdout.partition("Commands:")[2]  # no sentence is cut


@pytest.mark.speed
@pytest.mark.parametrize("words", [["--help"], ["status", "RUN"], ["list", "RUNS"], ["status", "RUN", "--json"]])
def test_reading_is_quick(words: list[str], run: Path) -> None:
    """CPU time, and the least of some tries, because other processes share the machine."""
    command = [word.replace("RUNS", str(run.parent)).replace("RUN", str(run)) for word in words]
    spent = []
    for _ in range(5):
        before = os.times()
        assert muster(*command).returncode == 0
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 0.3, spent


@pytest.mark.parametrize("words", [["--help"], ["status", "RUN"], ["list", "RUNS"], ["render", "jobs/digits.yaml"]])
def test_torch_is_not_imported(words: list[str], run: Path) -> None:
    command = [word.replace("RUNS", str(run.parent)).replace("RUN", str(run)) for word in words]
    program = (
        "import sys\n"
        "from trainer.launch.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print([name for name in ('torch', 'numpy', 'sklearn') if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["rnu"], ["rnu", "Did you mean 'run'"]),
        (["run"], ["'job'", "muster --help"]),
        (["status", "nowhere"], ["RUN='nowhere'", "muster list"]),
        (["logs", "RUN", "--rank", "9"], ["--rank=9", "has no log"]),
        (["run", "jobs/digits.yaml", "--on", "mesos"], ["--on='mesos'", "local, docker"]),
        (["run", "jobs/digits.yaml", "train.lrr=1"], ["train.lrr", "train.lr"]),
        (["run", "jobs/nothing.yaml"], ["jobs/nothing.yaml", "no such file"]),
        (["render", "jobs/digits.yaml", "--on", "docker", "--site", "no.yaml"], ["file='no.yaml'", "no such file"]),
        (["run", "jobs/digits.yaml", "partition=main"], ["partition='main'", "slurm's site file", "--site FILE"]),
        (["run", "jobs/digits.yaml", "--on", "docker", "image=mine"], ["image='mine'", "docker's site file", "--site"]),
        (["render", "jobs/digits.yaml", "claim=runs"], ["claim='runs'", "kubernetes's site file", "--on kubernetes"]),
        (["submit", "jobs/digits.yaml", "--sweep", "train.lr"], ["--sweep='train.lr'", "key=value,value"]),
    ],
)
def test_a_mistake_is_one_line(words: list[str], parts: list[str], run: Path) -> None:
    done = muster(*(word.replace("RUN", str(run)) for word in words))
    assert done.returncode == 64
    assert done.stderr.startswith("ERROR: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert [part for part in parts if part not in done.stderr] == [], done.stderr


def test_json_is_for_machines(run: Path) -> None:
    found = json.loads(muster("status", run, "--json").stdout)
    assert (found["state"], found["code"], found["steps"]) == ("done", 0, 9)
    assert json.loads(muster("list", run.parent, "--json").stdout) == [found]


def test_a_wait_for_nothing_ends(run: Path) -> None:
    (run / "logs").mkdir()
    (run / "logs/node-0.log").write_text("[muster] hello\n")
    assert muster("logs", run, "-f").stdout == "[muster] hello\n"


def test_a_reader_that_has_seen_enough_ends_the_command(run: Path) -> None:
    """As `| head` does; also while the run goes on, and nothing is printed any more."""
    (run / "logs").mkdir()
    (run / "logs/node-0.log").write_text("[muster] hello\n")
    (run / "exit.json").unlink()
    (run / "handle.json").unlink()  # by its events it runs
    for words in (["logs", run, "-f"], ["list", run.parent], ["status", run]):
        command = shlex.join([str(MUSTER), *map(str, words)])
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{command} | head -n 1 | head -c 1"],
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 1), words


def test_alone_it_explains_itself() -> None:
    assert muster().stdout == muster("--help").stdout


def test_a_mistake_of_the_agents_command_line_is_named() -> None:
    done = subprocess.run([sys.executable, "-m", "trainer", "--explian"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        64, "ERROR: option='--explian': is unknown. Did you mean --explain?\n",
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["cancel", "preempt"])
@pytest.mark.parametrize("code", [0, 1, None])
def test_what_has_ended_is_not_ended_again(run: Path, verb: str, code: int | None) -> None:
    """Its records stay as they were; without an end it is lost."""
    (run / "exit.json").write_text(json.dumps({"code": code})) if code is not None else (run / "exit.json").unlink()
    before = {path.name: path.read_text() for path in run.iterdir()}
    done = muster(verb, run)
    assert done.returncode == 64
    assert done.stderr.startswith(f"ERROR: RUN='{run}': is not running")
    assert {path.name: path.read_text() for path in run.iterdir()} == before


def test_the_step_is_the_newest_that_is_known(run: Path) -> None:
    """Metrics come every few steps only, and a restart goes back."""
    with (run / "events.jsonl").open("a") as file:
        for event in (
            {"event": "checkpoint", "time": 3, "step": 6},
            {"event": "training", "time": 4, "step": 2, "steps": 9},
            {"event": "checkpoint", "time": 5, "step": 4},
            {"event": "stopped", "time": 5, "step": 4},
        ):
            file.write(json.dumps(event) + "\n")
    assert "step 4 of 9" in muster("status", run).stdout
    (run / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 7, "time": 3}\n{"kind": "train", "step": 5, "time": 6}\n'
    )
    assert "step 5 of 9" in muster("status", run).stdout


def test_a_script_or_weights_that_are_not_there_are_refused_at_once(tmp_path: Path) -> None:
    words = ("submit", "jobs/digits.yaml", "device=cpu", f"runs={tmp_path / 'runs'}")
    for more in (["task=null", "script=nowhere.py"], ["checkpoint.load=nowhere.pt"]):
        done = muster(*words, *more)
        key, _, value = more[-1].partition("=")
        assert done.returncode == 64
        assert f"{key}='{value}': is not in {ROOT}. Give its absolute path" in done.stderr
    assert list((tmp_path / "runs").glob("*/")) == []


def test_where_a_log_lies_that_is_not_here(run: Path) -> None:
    (run / "logs").mkdir()
    (run / "logs/node-0.log").touch()
    done = muster("logs", run, "--rank", "1", "-f")
    assert done.returncode == 64
    assert f"There are node-0; the nodes have it in their own run folder, as {run.name}/logs/rank-1.log" in done.stderr
