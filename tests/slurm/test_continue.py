"""A run goes on where it ran, and by hand what `muster render` prints is the same job."""

import subprocess
from pathlib import Path

from slurm_cluster import Cluster
from slurm_runs import Run, muster, submit

from trainer.launch import control
from trainer.run.folder import RunFolder
from trainer.run.summary import resume_command

ONE = ("nodes=1", "devices_per_node=1")


def test_a_run_goes_on_in_slurm_with_its_site(slurm: Cluster, shared_path: Path) -> None:
    site = shared_path / "site.yaml"
    site.write_text("sbatch_args: [--nodelist=n2]\n")
    run = submit(shared_path / "runs", *ONE, "train.steps=5", "task_args.step_s=0", "--site", site)
    assert run.wait_end()["state"] == "done", run.describe()
    first = run.job_id
    muster("run", run.folder, "train.steps=9")
    assert run.status()["step"] == 9
    assert run.job_id != first
    assert slurm.job(run.job_id)["NodeList"] == "n2"
    assert [event["platform"] for event in run.events("wired")] == ["slurm", "slurm"]


def test_what_render_prints_trains(slurm: Cluster, shared_path: Path) -> None:
    words = ("jobs/digits.yaml", f"runs={shared_path}", *ONE, "train.steps=20", "--on", "slurm")
    rendered = muster("render", *words).stdout
    done = subprocess.run(["bash", "-e"], input=rendered, text=True, capture_output=True, cwd=shared_path)
    assert done.returncode == 0, done.stderr
    slurm.wait(done.stdout.split()[-1])
    run = Run(shared_path / "digits-ID")
    found = control.status(str(run.folder))
    assert (found["state"], found["step"]) == ("done", 20), run.describe()
    logs = "".join(path.read_text() for path in (run.folder / "logs").glob("*.log"))
    assert resume_command(RunFolder(run.folder)).endswith(f"muster run {run.folder} --on slurm")
    assert str(run.folder) in logs
