"""Training on a real cluster: the shapes that a job can have, with nothing in its way."""

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
from paths import SUPPORT
from slurm_cluster import Cluster
from slurm_runs import ROOT, Run, muster, submit

SHAPES = {
    "two nodes, two ranks each": ("nodes=2", "devices_per_node=2"),
    "four nodes, one rank each": ("nodes=4", "devices_per_node=1"),
    "one node, DataParallel over two devices": ("nodes=1", "devices_per_node=2", "parallel=dp"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_main_job_trains_in_a_folder_with_spaces(slurm: Cluster, shared_path: Path, shape: str) -> None:
    run = submit(shared_path / "my runs", *SHAPES[shape], "train.epochs=3", job="jobs/digits.yaml")
    status = run.wait_end()
    assert status["state"] == "done", run.describe()
    assert status["metrics"]["accuracy"] > 0.9
    assert slurm.wait(run.job_id)["ExitCode"] == "0:0"


def secrets_of(agents: str) -> list[str]:
    """The secret that each process with these words in its command line has in its environment; srun is one, too."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if agents in (path / "cmdline").read_text():
                found += re.findall(r"\bMUSTER_SECRET=([0-9a-f]{64})\b", (path / "environ").read_text())
    return found


def told_to_everybody(slurm: Cluster, job: str) -> str:
    """What any user of the cluster gets to see of a job."""
    told = [slurm.run("scontrol", "show", "--details", "job", job), slurm.run("squeue", "--Format=ALL", "--jobs", job)]
    told += [slurm.run("scontrol", "write", "batch_script", job, "-"), slurm.run("scontrol", "show", "step", job)]
    told.append(slurm.run("sacct", "--jobs", job, "--format=ALL", "--parsable2"))
    lines = [line.stdout for line in told]
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines.append((path / "cmdline").read_text())
    return "\n".join(lines)


def test_the_template_by_hand(slurm: Cluster, shared_path: Path) -> None:
    """Its agents share a secret that nobody else is told."""
    until = shared_path / "go on"
    words = ["tests/support/slow.yaml", f"runs={shared_path}", "train.steps=20", f"task_args.until={until}"]
    options = ["--nodes=2", "--gpus-per-node=2", f"--output={shared_path}/batch.out"]
    command = [sys.executable, "-m", "trainer", *words]
    job = slurm.sbatch(*options, "slurm/job.sbatch", f"--output={shared_path}/node-%n.out", *command, cwd=ROOT)
    run = Run(shared_path / f"slow-{job}")
    slurm.until("the first step", lambda: run.folder.exists() and run.events("first_step"))
    found = secrets_of("trainer\0" + "\0".join(words))
    assert len(found) >= 2 and len(set(found)) == 1
    assert found[0] not in told_to_everybody(slurm, job)
    until.touch()
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    assert run.events("done")[0]["step"] == 20
    kept = [path for path in shared_path.rglob("*") if path.is_file() and found[0].encode() in path.read_bytes()]
    assert kept == []


def test_a_script_job(slurm: Cluster, shared_path: Path) -> None:
    script = shared_path / "where.py"
    script.write_text(
        "import os, sys\nimport torch\nimport torch.distributed as dist\n"
        "dist.init_process_group('gloo')\nmine = torch.tensor([float(os.environ['RANK'])])\ndist.all_reduce(mine)\n"
        f"open('{shared_path}/' + os.environ['RANK'], 'w').write(f'{{mine.item()}} {{sys.argv[1:]}}')\n"
        "dist.destroy_process_group()\n"
    )
    job = shared_path / "script.yaml"
    job.write_text(f"script: {script}\nscript_args: [--lr, '0.1']\nnodes: 2\ndevices_per_node: 2\n")
    run = submit(shared_path / "runs", job=job)
    assert run.wait_end()["state"] == "done", run.describe()
    assert {(shared_path / str(rank)).read_text() for rank in range(4)} == {"6.0 ['--lr', '0.1']"}


def test_a_script_on_a_session(slurm: Cluster, shared_path: Path) -> None:
    run = submit(shared_path, "nodes=2", "script_args=[--epochs=2]", job="jobs/digits-script.yaml")
    status = run.wait_end()
    assert status["state"] == "done" and status["metrics"]["accuracy"] > 0.8, run.describe()
    assert run.events("training")[-1]["world_size"] == 4


def test_a_sweep_is_one_array_of_runs(slurm: Cluster, shared_path: Path) -> None:
    words = ("--sweep", "train.lr=0.01,0.002", "nodes=1", "train.steps=20", "task_args.step_s=0")
    folders = muster("submit", "tests/support/slow.yaml", f"runs={shared_path}", *words, "--on", "slurm").stdout.split()
    runs = [Run(Path(folder)) for folder in folders]
    first, second = (run.job_id for run in runs)
    assert first.partition("_")[0] == second.partition("_")[0]
    for run in runs:
        assert run.wait_end()["state"] == "done", run.describe()
    assert not all((a == b).all() for a, b in zip(*(run.weights().values() for run in runs), strict=True))
    for index, run in enumerate(runs):
        assert (run.folder / "logs/node-0.log").resolve().name == f"task-{index}-node-0.log"
        assert "step 20/20" in muster("logs", run.folder).stdout


def test_two_jobs_share_a_node_and_keep_to_their_own_gpus(slurm: Cluster, shared_path: Path) -> None:
    words = ("nodes=1", "devices_per_node=2", "train.steps=30", f"task_args.until={shared_path}/go on")
    site = shared_path / "site.yaml"
    site.write_text("sbatch_args: [--nodelist=n1]\n")
    runs = [submit(shared_path / "runs", *words, "--site", site) for _ in range(2)]
    for run in runs:
        run.wait_step(1)  # both at once
    (shared_path / "go on").touch()
    for run, mask in zip(runs, ("0,1", "2,3"), strict=True):
        assert run.wait_end()["state"] == "done", run.describe()
        for rank in (0, 1):
            assert f"GPUs of this rank: {mask}\n" in (run.folder / "logs" / f"rank-{rank}.log").read_text()


def test_editing_while_the_job_waits_changes_nothing(slurm: Cluster, shared_path: Path) -> None:
    project = shared_path / "my project"
    project.mkdir()
    code = "from slow_digits import SlowDigits\nclass Mine(SlowDigits):\n    pass\n"
    source = (SUPPORT / "slow_digits.py").read_text()
    (project / "slow_digits.py").write_text(source)
    (project / "mine.py").write_text(code)
    (project / "mine.yaml").write_text("name: mine\ntask: mine:Mine\ntrain: {steps: 5}\n")
    words = ("submit", "mine.yaml", f"runs={shared_path / 'runs'}", "--on", "slurm")
    run = Run(Path(muster(*words, cwd=project).stdout.strip()))
    (project / "mine.py").write_text("raise SystemExit('edited')\n")
    assert run.wait_end()["state"] == "done", run.describe()
    assert len(json.loads((run.folder / "plan" / "code.json").read_text())["sha256"]) == 64


REFUSALS = {
    "partition: nowhere": "invalid partition specified: nowhere",
    "account: nobody": "Invalid account or account/partition combination specified",
    "gpus: auto": "Requested node configuration is not available",  # 16, of hosts with 4
}


@pytest.mark.parametrize("fact", REFUSALS)
def test_slurms_own_refusal_is_shown_once(slurm: Cluster, shared_path: Path, fact: str) -> None:
    site = shared_path / "site.yaml"
    site.write_text(fact + "\n")
    words = ("jobs/digits.yaml", f"runs={shared_path}", "devices_per_node=16", "--on", "slurm", "--site", site)
    done = muster("submit", *words, check=False)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.count("ERROR") == done.stderr.count(REFUSALS[fact]) == len(done.stderr.splitlines()) == 1


def test_a_runs_folder_that_the_hosts_do_not_share(slurm: Cluster, tmp_path: Path) -> None:
    run = submit(tmp_path)  # below /tmp, which each host has for itself
    status = run.wait_end()
    assert status["state"] == "failed"
    assert f"{run.folder} must be on a file system that all nodes share (`runs` in slurm/site.yaml)" in status["reason"]
