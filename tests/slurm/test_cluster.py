"""The test cluster itself: hosts are apart, GPUs are counted, nothing is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from paths import SUPPORT
from slurm_cluster import Cluster
from slurm_packages import PACKAGE_OF, Unavailable, ensure

ONE_HOST = """
import os, signal, sys
from slurm_cluster import Cluster
from slurm_config import Layout
cluster = Cluster(Layout(hosts=1, accounting=False)).start()
job = cluster.sbatch("--chdir=/", "--output=/dev/null", "--wrap", "sleep 1000")
cluster.wait(job, "RUNNING")
print(cluster.session, *cluster.pids.values(), flush=True)
sys.stdin.readline()
"""


def test_hosts_are_machines_of_their_own(slurm: Cluster, shared_path: Path) -> None:
    leave_name = "for folder in /tmp /dev/shm .; do touch $folder/at_$(hostname); done; sleep 1"
    look = "echo $(hostname) $(hostname -i) $(ls -d /tmp/at_* /dev/shm/at_*)"
    command = ["srun", "--nodes=4", "sh", "-c", f"{leave_name}; {look}"]
    said = slurm.run(*command, cwd=shared_path).stdout.splitlines()
    names = ["n1", "n2", "n3", "n4"]
    addresses = [slurm.layout.address(name) for name in names]
    assert sorted(said) == [
        f"{name} {address} /dev/shm/at_{name} /tmp/at_{name}" for name, address in zip(names, addresses, strict=True)
    ]
    assert not list(Path("/tmp").glob("at_n?"))
    assert sorted(path.name for path in shared_path.iterdir()) == [f"at_{name}" for name in names]


def test_a_second_job_on_a_host_is_given_the_other_gpus(slurm: Cluster) -> None:
    job = slurm.sbatch("--gpus-per-node=2", "--nodelist=n1", "--output=/dev/null", "--wrap", "sleep 60")
    slurm.wait(job, "RUNNING")
    mask = slurm.run("srun", "--gpus-per-node=2", "--nodelist=n1", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert mask.stdout == "2,3\n"


def test_accounts(slurm: Cluster) -> None:
    assert "root" in slurm.run("sacctmgr", "-n", "show", "account").stdout
    assert "Invalid account" in slurm.run("sbatch", "--account=x", "--wrap", "id", check=False).stderr
    with slurm.no_accounting():
        hidden = slurm.run("sacct", check=False)
    assert (hidden.returncode, hidden.stderr) == (1, "Slurm accounting storage is disabled\n")
    assert slurm.run("sacct", "-n").returncode == 0


def test_nothing_is_left_when_the_owner_is_killed(slurm: Cluster) -> None:
    # `slurm` only so that this skips where no cluster can run.
    owner = subprocess.Popen(
        [sys.executable, "-c", ONE_HOST],
        cwd=SUPPORT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    session, *pids = owner.stdout.readline().split()
    mounts = Path("/proc/self/mounts").read_text()
    assert session not in mounts and "cluster" not in mounts
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    slurm.until("the end of the cluster", lambda: not Path(session).exists(), 10)
    slurm.until("its processes", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="sudo make test-slurm"):
        ensure(install=True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setitem(PACKAGE_OF, "no-such-program", "no-such-package")
    with pytest.raises(Unavailable, match=r"apt-get install .*no-such-package"):
        ensure(install=False)
