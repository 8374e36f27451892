"""Slurm's site file: each key becomes the option that it says, in the command line that `muster render` prints."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from paths import ROOT

from trainer.errors import JobError
from trainer.launch.submit import render_job, submit_job

RUN = "/big/digits-ID"
OURS = [
    "sbatch", "--job-name=digits", "--nodes=2", "--signal=USR2@60",
    f"--chdir={RUN}/code", f"--output={RUN}/logs/slurm-%j.out",
]  # fmt: skip
SCRIPT = [f"{RUN}/job.sbatch", f"--output={RUN}/logs/node-%n.log"]
AGENT = ["-m", "muster", "agent", f"{RUN}/job.yaml"]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def last_command(text: str) -> list[str]:
    """The words of the last command, which stands above what it is handed."""
    return shlex.split(next(line for line in text.splitlines() if not line.endswith("\\")))


def command_line(folder: Path, text: str) -> list[str]:
    """The words of the line that submits."""
    site = folder / "site.yaml"
    site.write_text(text)
    words = ["nodes=2", "devices_per_node=4", "train.batch_size=64", "runs=/big"]
    return last_command(render_job("jobs/digits.yaml", words, "slurm", site))


@pytest.mark.parametrize(
    ("site", "flags"),
    [
        ("{}", ["--gpus-per-node=4"]),
        ("gpus: none", []),
        ("gpus: --gres=gpu:a100:{n}", ["--gres=gpu:a100:4"]),
        ("partition: long\naccount: vision\nqos: high\nconstraint: h100&ib\nreservation: course\ngpus: none",
         ["--partition=long", "--account=vision", "--qos=high", "--constraint=h100&ib", "--reservation=course"]),
        ("memory_gb: 0", ["--mem=0G", "--gpus-per-node=4"]),
        ("memory_gb: 96\ncpus_per_device: 6\ngpus: none", ["--mem=96G", "--cpus-per-task=24"]),
        ("time_limit_min: 90\nsbatch_args: [--exclusive, --comment=a paper]",
         ["--time=90", "--gpus-per-node=4", "--exclusive", "--comment=a paper"]),
    ],
)  # fmt: skip
def test_options_of_sbatch(tmp_path: Path, site: str, flags: list[str]) -> None:
    assert command_line(tmp_path, site) == [*OURS, *flags, *SCRIPT, sys.executable, str(ROOT / "muster.py"), *AGENT[2:]]


def test_the_notice_comes_after_the_first_half_of_a_short_limit(tmp_path: Path) -> None:
    assert "--signal=USR2@30" in command_line(tmp_path, "time_limit_min: 1")


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("srun_args: [--cpu-bind=none, --mpi=none]\npython: /opt/python",
         ["--cpu-bind=none", "--mpi=none", "/opt/python", *AGENT]),
        ("runtime: pyxis\nimage: team#muster:1\nmounts: ['/data:/data:ro']\nsrun_args: [--mpi=none]",
         ["--mpi=none", "--container-image=team#muster:1", "--container-mounts=/big:/big,/data:/data:ro",
          f"--container-workdir={RUN}/code", "python", *AGENT]),
        ("runtime: apptainer\nimage: /img/my muster.sif\nmounts: ['/data:/data:ro']",
         ["apptainer", "exec", "--nv", "--bind", "/big:/big", "--bind", "/data:/data:ro", "--pwd", f"{RUN}/code",
          "/img/my muster.sif", "python", *AGENT]),
    ],
    ids=["plain", "pyxis", "apptainer"],
)  # fmt: skip
def test_what_srun_starts(tmp_path: Path, site: str, words: list[str]) -> None:
    assert command_line(tmp_path, f"gpus: none\n{site}") == [*OURS, *SCRIPT, *words]


def test_variables_of_fabric_and_setup_go_with_the_job(tmp_path: Path) -> None:
    text = "fabric: efa\nsetup: /etc/my site.sh\nruntime: pyxis\nimage: muster\n"
    words = command_line(tmp_path, text)
    assert "--container-env=FI_EFA_USE_HUGE_PAGE,FI_PROVIDER" in words  # the image's own values would win
    assert words[:5] == ["env", "FI_PROVIDER=efa", "FI_EFA_USE_HUGE_PAGE=0", "MUSTER_SETUP=/etc/my site.sh", "sbatch"]


def test_an_unknown_fabric_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"fabric='token-ring': is not a network profile.*none, infiniband"):
        command_line(tmp_path, "fabric: token-ring")


def test_run_folders_are_made_where_the_site_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"runs: {tmp_path / 'project space'}\n")
    monkeypatch.setattr("trainer.launch.slurm.platform.Slurm.submit", lambda *_: {"job_id": "7"})
    submit_job("jobs/digits.yaml", [], "slurm", site)
    (run,) = (tmp_path / "project space").glob("digits-*")
    assert f"--chdir={run}/code" in last_command((run / "plan/slurm.txt").read_text())


def test_the_command_comes_before_what_it_is_handed(tmp_path: Path) -> None:
    lines = render_job("jobs/digits.yaml", [f"runs={tmp_path}", "device=cpu"], "slurm", None).splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["umask", "mkdir", "cat", "cat", "sbatch", "name:"]
    assert "END_OF_YAML" in lines and lines[-2] == "END_OF_SBATCH"
    assert lines[-1] == f"# Modules of your own belong in {tmp_path}/digits-ID/code"
