"""What `muster` asks of Slurm's client commands, and how often; programs that write down their words stand in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import MUSTER, ROOT

from trainer.errors import JobError
from trainer.launch import control
from trainer.launch.slurm.platform import Slurm
from trainer.launch.submit import render_job, submit_job
from trainer.launch.sweep import submit_sweep
from trainer.run.folder import RunFolder, last_event
from trainer.run.summary import resume_command

JOB, CPU = "jobs/digits.yaml", ["device=cpu", "devices_per_node=1"]


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Slurm's programs: each adds its words to a file of its name, and does what a test wrote for it."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name: str, body: str) -> None:
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{folder}/{name}.words"\n{body}\n')
        (folder / name).chmod(0o755)

    def words(name: str) -> list[str]:
        path = folder / f"{name}.words"
        return path.read_text().splitlines() if path.exists() else []

    write("sbatch", "echo Submitted batch job 7")
    write("squeue", "echo 'RUNNING|None'")
    for name in ("srun", "scontrol", "sacct", "scancel"):  # submitit looks for srun
        write(name, "exit 0")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return SimpleNamespace(write=write, words=words)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder for run folders."""
    return tmp_path / "runs"


def ends(client: SimpleNamespace) -> None:
    """The job ends, as Slurm tells it."""
    client.write("squeue", "exit 1")
    client.write("sacct", "echo 'FAILED|1:0'")


def test_an_answer_is_kept_for_some_seconds(
    client: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform, run, handle = Slurm(), RunFolder(tmp_path), {"job_id": "7"}
    for _ in range(20):
        assert platform.status(run, handle).phase == "running"
    assert len(client.words("squeue")) == 1
    platform.preempt(run, handle)
    platform.status(run, handle)
    platform.cancel(run, handle)
    platform.status(run, handle)
    assert len(client.words("squeue")) == 3
    monkeypatch.setattr(Slurm, "poll_s", 0)
    platform.status(run, handle)
    assert len(client.words("squeue")) == 4
    assert platform.status(run, {"job_id": "8"}).phase == "running"
    assert "--jobs=8" in client.words("squeue")[-1]


def test_who_follows_asks_seldom(client: SimpleNamespace, runs: Path) -> None:
    run = submit_job(JOB, [*CPU, f"runs={runs}"], "slurm", None).path
    for command in (["logs", str(run), "-f"], ["run", JOB, f"runs={runs}", *CPU, "--on", "slurm"]):
        before = len(client.words("squeue"))
        process = subprocess.Popen([MUSTER, *command], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while len(client.words("squeue")) == before and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(1)
        process.kill()
        process.wait()
        assert len(client.words("squeue")) == before + 1, command


def test_a_run_is_continued_where_it_ran(client: SimpleNamespace, runs: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("partition: night\n")
    run = submit_job(JOB, [*CPU, f"runs={runs}"], "slurm", site)
    ends(client)
    word, verb, folder = resume_command(run).split()
    assert (Path(word).name, verb, folder) == ("muster", "run", str(run))
    submit_job(folder, ["train.epochs=20"], None, None)
    assert len(client.words("sbatch")) == 2
    assert all("--partition=night" in words for words in client.words("sbatch"))
    assert any(line.startswith("sbatch ") for line in render_job(folder, [], None, None).splitlines()[:3])
    assert "supervisor" in render_job(folder, [], "local", None)
    with pytest.raises(JobError, match="nowhere"):  # refused elsewhere, it has not moved
        submit_job(folder, ["task=null", "script=nowhere.py"], "local", None)
    submit_job(folder, ["task=trainer.tasks.digits:Digits", "script=null"], None, None)
    assert len(client.words("sbatch")) == 3


def test_a_refused_job_leaves_nothing_and_a_refused_run_stays(client: SimpleNamespace, runs: Path) -> None:
    client.write("sbatch", "echo 'sbatch: error: invalid partition specified: nigth' >&2; exit 1")
    with pytest.raises(JobError, match=r"Slurm refused: .*invalid partition.*slurm/site\.yaml"):
        submit_job(JOB, [*CPU, f"runs={runs}"], "slurm", None)
    assert list(runs.glob("*-*")) == [], "a refused job leaves no run folder"
    client.write("sbatch", "echo Submitted batch job 8")
    run = submit_job(JOB, [*CPU, f"runs={runs}"], "slurm", None)
    ends(client)
    client.write("sbatch", "echo 'sbatch: error: QOS is over its limit' >&2; exit 1")
    with pytest.raises(JobError, match="over its limit"):
        submit_job(str(run), [], None, None)
    assert "over its limit" in str(run.read_events()) and run.exists(), "but a run that is continued stays"
    expected = {"platform": "slurm", "site": None, "job_id": "8", "run": str(run)}
    assert json.loads(run.handle.read_text()) == expected


def test_nobody_else_may_write_what_submitit_reads(client: SimpleNamespace, runs: Path) -> None:
    """Whatever the umask is."""
    before = os.umask(0)
    try:
        run = submit_job(JOB, [*CPU, f"runs={runs}"], "slurm", None).path
        assert (run / "plan").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")
def test_a_run_of_another_user_is_not_continued(client: SimpleNamespace, runs: Path) -> None:
    run = submit_job(JOB, [*CPU, f"runs={runs}"], "slurm", None).path
    ends(client)
    os.chown(run / "plan", 12345, -1)
    with pytest.raises(JobError, match="belongs to user 12345"):
        submit_job(str(run), [], None, None)


def test_a_run_that_slurm_started_by_hand_is_continued_there(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "wired", "platform": "slurm", "time": 1}\n')
    assert resume_command(RunFolder(tmp_path)).endswith(f" run {tmp_path} --on slurm")


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Batch job submission failed: Invalid account", r"Correct slurm/site\.yaml or the job$"),
        ("Unable to contact slurm controller (connect failure)", r"Wait until `scontrol ping` .*$"),
    ],
)
def test_a_refused_sweep_leaves_no_run(client: SimpleNamespace, runs: Path, said: str, remedy: str) -> None:
    client.write("sbatch", f"echo 'sbatch: error: {said}' >&2; exit 1")
    with pytest.raises(JobError, match=remedy):
        submit_sweep(JOB, [*CPU, f"runs={runs}"], "slurm", None, "train.lr=0.1,0.01")
    assert list(runs.glob("*/")) == []


def test_a_job_that_slurm_may_have_taken_keeps_its_run(client: SimpleNamespace, runs: Path) -> None:
    said = "Batch job submission failed: Socket timed out on send/recv operation"
    client.write("sbatch", f"echo 'sbatch: error: {said}' >&2; exit 1")
    with pytest.raises(JobError, match="`squeue --me` says whether Slurm took the job"):
        submit_job(JOB, [*CPU, f"runs={runs}"], "slurm", None)
    (run,) = runs.glob("*/")
    ended = last_event(RunFolder(run).read_events(), "ended")
    assert ended is not None and said in ended["reason"] and (run / "code").is_dir()


@pytest.mark.parametrize("sizes", ["nodes=1,2", "devices_per_node=1,2", "device=cpu,cuda"])
def test_an_array_cannot_give_its_runs_different_sizes(client: SimpleNamespace, runs: Path, sizes: str) -> None:
    words = [f"runs={runs}", "nodes=2", "parallel=ddp", "device=cuda", "devices_per_node=1"]
    with pytest.raises(JobError, match=rf"--sweep='{sizes}': .* needs --\S+\. Submit them one by one: .* --on slurm"):
        submit_sweep(JOB, words, "slurm", None, sizes)
    assert client.words("sbatch") == [] and not runs.exists()
    made = submit_sweep(JOB, [*CPU, f"runs={runs}"], "slurm", None, "name=a,b").runs
    assert [run.name[:2] for run in made] == ["a-", "b-"]


def test_it_is_unknown_how_a_job_is_when_nobody_answers(client: SimpleNamespace, runs: Path) -> None:
    """On a host without Slurm's commands, and while the controller restarts; what has ended is known all the same."""
    run = submit_job(JOB, [*CPU, f"runs={runs}"], "slurm", None)
    for name in ("squeue", "scontrol", "sacct"):
        client.write(name, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    found = control.status(str(run))
    assert (found["state"], "Unable to contact slurm controller" in found["reason"]) == ("unknown", True)
    with pytest.raises(JobError, match=rf"may still be running: .*remove {run.handle}"):
        submit_job(str(run), [], None, None)
    client.write("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert control.status(str(run))["state"] == "lost", "the controller says that it does not know the job"
    client.write("squeue", "exec /nowhere/squeue")
    assert control.status(str(run))["state"] == "unknown"
    run.record("done", attempt=0, step=9)
    assert control.status(str(run))["state"] == "done"


def test_what_people_set_for_all_their_jobs_goes_along(
    client: SimpleNamespace, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what an interactive job sets for its own processes."""
    client.write("sbatch", 'echo Submitted batch job 7; env >"$0.env"')
    inherited = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_MEM_PER_NODE": "4", "SBATCH_EXPORT": "NONE"}
    mine = {"SBATCH_ACCOUNT": "vision", "SLURM_CONF": "/etc/slurm.conf"}
    for name, value in (inherited | mine).items():
        monkeypatch.setenv(name, value)
    submit_job(JOB, [*CPU, f"runs={runs}"], "slurm", None)
    program = shutil.which("sbatch")
    assert program
    seen = dict(line.partition("=")[::2] for line in Path(f"{program}.env").read_text().splitlines())
    assert not inherited.keys() & seen.keys() and mine.items() <= seen.items()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "2,1", "SLURM_CPUS_ON_NODE": "2"}, "1"),
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2),48,128(x3)", "SLURM_CPUS_ON_NODE": "64"}, "48"),
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2)", "SLURM_CPUS_PER_TASK": "24", "SLURM_CPUS_ON_NODE": "64"}, "24"),
        ({"SLURM_JOB_CPUS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "SLURM_CPUS_ON_NODE": "8"}, "8"),  # inherited
        ({"SLURM_CPUS_ON_NODE": "16"}, "16"),
    ],
)
def test_each_node_has_what_its_task_asks_for(
    client: SimpleNamespace, environment: dict[str, str], expected: str
) -> None:
    facts = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", **environment}
    subprocess.run(["bash", "slurm/job.sbatch", "program"], env={"PATH": os.environ["PATH"], **facts}, check=True)
    assert f"--cpus-per-task={expected}" in client.words("srun")[0].split()


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_the_container_of_a_sweep_sees_its_runs(
    client: SimpleNamespace, runs: Path, tmp_path: Path, runtime: str
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"runtime: {runtime}\nimage: muster.sqsh\nruns: {runs}\n")
    made = [run.path for run in submit_sweep(JOB, CPU, "slurm", site, "train.lr=0.1,0.01").runs]
    (sent,) = client.words("sbatch")
    assert f"{runs}:{runs}" in sent
    assert {run.parent for run in made} == {runs}
    assert all((run / "code/trainer/config/load.py").is_file() for run in made)


def test_what_is_rendered_is_what_is_sent(client: SimpleNamespace, tmp_path: Path) -> None:
    """Word for word, but for the script's name, when it is pasted into a shell."""
    runs, site = tmp_path / "my runs", tmp_path / "site.yaml"
    site.write_text(f"fabric: efa\nruns: {runs}\n")
    run = submit_job(JOB, CPU, "slurm", site).path
    made = runs / "digits-ID"
    rendered = render_job(JOB, CPU, "slurm", site)
    by_hand = subprocess.run(["bash", "-e"], input=rendered, text=True, capture_output=True, cwd=tmp_path)
    assert (by_hand.returncode, by_hand.stdout) == (0, "Submitted batch job 7\n"), by_hand.stderr
    ours, theirs = client.words("sbatch")
    assert run.parent == runs
    ours = re.sub(r"/plan/\S+\.sh ", "/job.sbatch ", ours)
    assert ours.replace(run.name, made.name) == theirs
    assert (made / "job.sbatch").read_text() == (run / "plan/7_submission.sh").read_text()
    assert (made / "job.yaml").read_text() == (run / "job.yaml").read_text()
    assert (made / "code").is_dir() and (made / "logs").is_dir()


def test_a_script_that_the_snapshot_lacks_is_refused(client: SimpleNamespace, runs: Path) -> None:
    words = [*CPU, f"runs={runs}", "task=null"]
    with pytest.raises(JobError, match=r"script='nowhere/train\.py'.*absolute path, or name it in snapshot\.include"):
        submit_job(JOB, [*words, "script=nowhere/train.py"], "slurm", None)
    assert client.words("sbatch") == []
    submit_job(JOB, [*words, "script=/on/the/nodes/train.py"], "slurm", None)  # which we cannot see
