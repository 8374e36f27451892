"""Muster on a laptop, and a cluster that only ssh reaches: a real sshd, and real Slurm behind it."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from login_host import SSHD, Laptop, LoginHost
from muster_runs import FULL, kill, wait_for
from slurm_cluster import Cluster
from slurm_config import CONTROLLER
from stopwatch import Stopwatch

from trainer.records import read_json
from trainer.run.folder import RunFolder

ROUNDS = 50 if FULL else 5
"""How often the connection is cut at a random moment of a submission."""
SEED = 16
MASTER = " -f -N "
"""In the command line of the process that shares its connection."""
CHATTER = "echo Welcome to the cluster; echo 2>&1 'quota: 97 %'; printf 'no line end'\n"
ONE = ("nodes=1", "devices_per_node=1")


@pytest.fixture(scope="module")
def laptop(slurm_session: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    if not os.path.exists(SSHD):
        pytest.skip("no sshd: apt-get install openssh-server")
    folder = tmp_path_factory.mktemp("laptop")
    enter = f"nsenter --target {slurm_session.pids[CONTROLLER]} --mount --net --uts --ipc"
    host = LoginHost(slurm_session.session / "login", enter, folder)
    host.home.joinpath(".bashrc").write_text(CHATTER)
    yield Laptop(host, folder)
    host.stop()


@pytest.fixture(autouse=True)
def in_order(slurm_session: Cluster) -> Iterator[None]:
    yield
    slurm_session.reset()


def test_an_edited_line_runs_is_followed_stopped_and_continued(laptop: Laptop, stopwatch: Stopwatch) -> None:
    """One training that meets all verbs, of code that was edited after an equal tree was sent twice."""
    held = laptop.host.site(sbatch_args="[--hold]")
    waits = [laptop.submit("name=waits", site=held) for _ in range(2)]
    assert len(list((laptop.host.home / ".muster/code").iterdir())) == 1
    laptop.must("cancel", waits[0])
    assert laptop.status(waits[0])["state"] == "cancelled"
    task = laptop.project / "slow_digits.py"
    task.write_text(task.read_text().replace("GPUs of this rank", "a new line"))

    process = laptop.start("run", "job.yaml", "--on", "slurm", "--site", laptop.site, *ONE, "train.steps=40")
    assert process.stdout
    run = Path(process.stdout.readline().removeprefix("run folder: ").strip())
    wait_for("steps", lambda: (run / "metrics.jsonl").exists())
    with stopwatch.at_most(1.0):
        assert laptop.status(run)["state"] == "running"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=400)
    assert process.returncode not in (0, 64) and "training 40 steps" in out and "CANCELLED" in err, out + err
    assert laptop.muster("cancel", run).stderr.count("\n") == 1  # it has ended

    done = laptop.muster("run", run, "task_args.step_s=0.01")
    assert done.returncode == 0 and "accuracy" in done.stdout, done.stdout + done.stderr
    there = laptop.there(run)
    assert (run / "metrics.jsonl").read_bytes() == (there / "metrics.jsonl").read_bytes()
    assert not (run / "checkpoints").exists() and list((there / "checkpoints").glob("step-*"))
    laptop.must("pull", run, "--checkpoints", "last")
    [brought] = (run / "checkpoints").glob("step-*")
    weights = brought / "model.pt"
    assert weights.read_bytes() == (there / weights.relative_to(run)).read_bytes()
    begun = [event["step"] for event in RunFolder(run).read_events() if event["event"] == "training"]
    assert len(begun) == 2 and begun[1] > 0
    assert "a new line" in laptop.must("logs", run, "--rank", "0") and "GPUs" not in laptop.must("logs", run)
    states = {each["run"]: each["state"] for each in json.loads(laptop.must("list", "--json"))}
    assert states == {str(waits[0]): "cancelled", str(waits[1]): "pending", str(run): "done"}
    assert len(list(laptop.runs_there.glob(f"{run.name}-*"))) == 1


@pytest.mark.speed
def test_a_submission_costs_little(laptop: Laptop, slurm: Cluster, stopwatch: Stopwatch) -> None:
    """Beside the same on the login node, in turn."""
    sites = [laptop.host.site(sbatch_args="[--hold]"), laptop.host.keep("login.yaml", "sbatch_args: [--hold]")]
    laptop.submit("name=first", site=sites[0])
    times: list[list[float]] = [[], []]
    for _ in range(3):
        for site, taken in zip(sites, times, strict=True):
            began = time.monotonic()
            laptop.submit("name=again", f"runs={laptop.host.folder}/runs", site=site)
            taken.append(time.monotonic() - began)
    stopwatch.check(min(times[0]) - min(times[1]), 1.0, "ssh")


@pytest.mark.parametrize(
    ("host", "keys", "code", "words"),
    [
        ("stranger", {}, 64, "its host key is not known"),
        ("intruder", {}, 64, "does not let you in"),
        ("nowhere", {}, 1, "cannot be reached"),
        ("login", {"python": "/nowhere/python"}, 64, "has no /nowhere/python that runs"),
        ("login", {"ssh_folder": "/dev/shm"}, 64, "can be written to by other users"),
        ("login", {"sbatch_args": "[--partition=none]"}, 64, "invalid partition"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(
    laptop: Laptop, host: str, keys: dict[str, str], code: int, words: str
) -> None:
    site, before = laptop.host.site(host, **keys), len(list(laptop.runs_there.glob("*/")))
    done = laptop.muster("submit", "job.yaml", "--on", "slurm", "--site", site, "runs=refused")
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    assert done.returncode == code and len(lines) == 1 and words in lines[0], done.stderr
    assert not list((laptop.project / "refused").glob("*/"))
    assert len(list(laptop.runs_there.glob("*/"))) == before


def jobs(slurm: Cluster, name: str) -> list[str]:
    """The jobs of a name, whatever became of them."""
    return slurm.run("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%i").stdout.split()


def check_once(laptop: Laptop, slurm: Cluster, name: str, was_done: bool = False) -> None:
    """The same command completes what was begun: one job, one folder on either side."""
    if not was_done:
        laptop.submit(f"name={name}")
    [run] = (laptop.project / "runs").glob(f"{name}-*")
    assert jobs(slurm, name) == [laptop.status(run)["handle"]["there"]["job_id"]]
    assert len(list(laptop.runs_there.glob(f"{name}-*"))) == 1


@pytest.mark.timeout(40 * ROUNDS + 100)
def test_a_connection_that_is_cut_at_any_moment_leaves_one_job(laptop: Laptop, slurm_session: Cluster) -> None:
    """Ends one of the processes on the way, at a moment of the whole submission, then says the same again."""
    dice = random.Random(SEED)
    laptop.site = laptop.host.site(sbatch_args="[--hold]")
    began = time.monotonic()
    laptop.submit("name=whole")
    whole_s = time.monotonic() - began
    for number in range(ROUNDS):
        name = f"cut{number}"
        process = laptop.start("submit", "job.yaml", "--on", "slurm", "--site", laptop.site, f"name={name}")
        time.sleep(dice.uniform(0.1, 1.2) * whole_s)
        victims = [*laptop.host.processes("ssh", "sshd", "there"), process.pid]
        for pid in victims if dice.random() < 0.2 else [dice.choice(victims)]:
            kill(pid)
        process.communicate(timeout=400)
        folders = list((laptop.project / "runs").glob(f"{name}-*"))
        was_done = [folder for folder in folders if (read_json(folder / "handle.json") or {}).get("accepted")]
        for folder in folders:
            if not (folder / "handle.json").exists():  # muster itself was killed while it still made the folder
                assert process.returncode == -signal.SIGKILL
                shutil.rmtree(folder)
        assert process.returncode != 0 or was_done
        check_once(laptop, slurm_session, name, bool(was_done))  # it was killed before it could say so


def test_a_cut_between_sbatch_and_its_answer_leaves_one_job(laptop: Laptop, slurm_session: Cluster) -> None:
    """Slurm has the job, and whoever asked for it is killed before the answer is written down."""
    folder = laptop.host.home / "bin"
    folder.mkdir()
    laptop.host.home.joinpath(".bash_profile").write_text(f"export PATH={folder}:$PATH\n")
    program = folder / "sbatch"
    program.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"\nkill -KILL $PPID\nrm {program}\n')
    program.chmod(0o755)
    laptop.site = laptop.host.site(sbatch_args="[--hold]")
    done = laptop.muster("submit", "job.yaml", "--on", "slurm", "--site", laptop.site, "name=between")
    assert done.returncode == 1 and "The same command completes it" in done.stderr, done.stderr
    [run] = (laptop.project / "runs").glob("between-*")
    assert "its submission was cut off" in laptop.must("status", run)
    check_once(laptop, slurm_session, "between")
    for pid in laptop.host.processes(MASTER):
        kill(pid)
    for _ in range(2):
        assert laptop.status(run)["state"] == "pending"
    assert len(laptop.host.processes(MASTER)) == 1  # the next connection took the place of the one that was killed
