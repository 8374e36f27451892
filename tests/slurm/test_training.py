"""Training on a real cluster: the shapes that a job can have, with nothing in its way."""

import json
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import Run, muster, submit

SHAPES = {
    "two nodes, two ranks each": ("nodes=2", "devices_per_node=2"),
    "four nodes, one rank each": ("nodes=4", "devices_per_node=1"),
    "one node, DataParallel over two devices": ("nodes=1", "devices_per_node=2", "parallel=dp"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_main_job_trains(slurm: Cluster, shared_path: Path, shape: str) -> None:
    run = submit(shared_path / "runs", *SHAPES[shape], "train.epochs=3", job="jobs/digits.yaml")
    status = run.wait_end()
    assert status["state"] == "done", run.describe()
    assert status["metrics"]["accuracy"] > 0.9
    assert slurm.wait(run.job_id)["ExitCode"] == "0:0"


def test_a_path_with_spaces(slurm: Cluster, shared_path: Path) -> None:
    run = submit(shared_path / "my runs", "train.steps=20", "task_args.step_s=0")
    assert run.wait_end()["state"] == "done", run.describe()


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


def test_a_sweep_is_one_array_of_runs(slurm: Cluster, shared_path: Path) -> None:
    words = ("--sweep", "train.lr=0.01,0.002", "nodes=1", "train.steps=20", "task_args.step_s=0")
    folders = muster("submit", "tests/slurm/slow.yaml", f"runs={shared_path}", *words, "--on", "slurm").stdout.split()
    runs = [Run(Path(folder)) for folder in folders]
    first, second = (run.job_id for run in runs)
    assert first.partition("_")[0] == second.partition("_")[0]
    for run in runs:
        assert run.wait_end()["state"] == "done", run.describe()
    assert not all((a == b).all() for a, b in zip(*(run.weights().values() for run in runs), strict=True))


def test_two_jobs_share_a_node_and_keep_to_their_own_gpus(slurm: Cluster, shared_path: Path) -> None:
    words = ("nodes=1", "devices_per_node=2", "train.steps=60")
    site = shared_path / "site.yaml"
    site.write_text("sbatch_args: [--nodelist=n1]\n")
    runs = [submit(shared_path / "runs", *words, "--site", site) for _ in range(2)]
    for run in runs:
        assert run.wait_end()["state"] == "done", run.describe()
    masks = {event["visible_devices"] for run in runs for event in run.events("wired")}
    assert masks == {"0,1", "2,3"}


def test_editing_while_the_job_waits_changes_nothing(slurm: Cluster, shared_path: Path) -> None:
    project = shared_path / "project"
    project.mkdir()
    code = "from slow_digits import SlowDigits\nclass Mine(SlowDigits):\n    pass\n"
    source = Path(__file__).with_name("slow_digits.py").read_text()
    (project / "slow_digits.py").write_text(source)
    (project / "mine.py").write_text(code)
    (project / "job.yml.yaml").write_text("name: mine\ntask: mine:Mine\ntrain: {steps: 5}\n")
    words = ("submit", "job.yml.yaml", f"runs={shared_path / 'runs'}", "--on", "slurm")
    run = Run(Path(muster(*words, cwd=project).stdout.strip()))
    (project / "mine.py").write_text("raise SystemExit('edited')\n")
    assert run.wait_end()["state"] == "done", run.describe()
    assert len(json.loads((run.folder / "plan" / "code.json").read_text())["sha256"]) == 64


def test_slurms_own_refusal_is_shown_once(slurm: Cluster, shared_path: Path) -> None:
    site = shared_path / "site.yaml"
    for fact, word in (
        ("partition: nowhere", "partition"),
        ("account: nobody", "account"),
        ("gpus: '--gres=gpu:9'", ""),
    ):
        site.write_text(fact + "\n")
        text = fact.replace("9'", "{n}'") if "gres" in fact else fact
        site.write_text(text + "\n")
        many = ["devices_per_node=16", "train.batch_size=64"] if "gres" in fact else []
        done = muster(
            "submit", "jobs/digits.yaml", f"runs={shared_path}", *many, "--on", "slurm", "--site", site, check=False
        )
        assert done.returncode == 64
        assert done.stderr.count("ERROR") == 1 and "Traceback" not in done.stderr
        assert word in done.stderr


def test_a_runs_folder_that_the_hosts_do_not_share(slurm: Cluster, tmp_path: Path) -> None:
    done = muster("submit", "tests/slurm/slow.yaml", "runs=/tmp/not-shared", "--on", "slurm", check=False)
    run = Run(Path(done.stdout.strip())) if done.returncode == 0 else None
    if run is None:
        assert "shared" in done.stderr
        return
    status = run.wait_end()
    assert status["state"] == "failed"
    assert "shared" in status["reason"]
