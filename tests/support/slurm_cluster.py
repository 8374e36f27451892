"""A real Slurm cluster on one machine: its hosts have a network, a name, /tmp and /dev/shm of their own.

    with Cluster(shared=[checkout]) as cluster:
        job = cluster.sbatch("--nodes=2", script)
        cluster.power_off("n2")

As a program it brings one up, runs a command or a shell from which sbatch and the others lead into it, and
takes it down: python tests/support/slurm_cluster.py squeue
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import slurm_packages
from slurm_client import Client
from slurm_config import CONTROLLER, STATE, Layout

CONTROLLER_PROGRAM = Path(__file__).with_name("slurm_controller.py")
UNSHARE = ("unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL")


class Cluster(Client):
    """Owns the cluster from start() to stop(). It ends with this process too, however that ends.

    shared: folders that every host sees; beside them the hosts share all but /tmp, /dev/shm and /run.
    """

    def __init__(self, layout: Layout | None = None, shared: Sequence[Path] = ()):
        # Other ids each time: a job must never find the files of an earlier session's job.
        self.layout = replace(layout or Layout(), first_job_id=random.randrange(1000, 600_000, 10))
        self.shared = [Path(path).resolve() for path in (*shared, sys.prefix, sys.base_prefix)]
        self.touched: set[str] = set()  # hosts that reset() must power-cycle
        self.off: set[str] = set()

    def start(self) -> "Cluster":
        """Returns when every host is in service. RuntimeError with the daemons' last words when not."""
        self.session = Path(tempfile.mkdtemp(prefix="muster-slurm-", dir="/var/tmp"))
        self.session.chmod(0o755)
        shared = [str(path) for path in (*self.shared, self.session)]
        owner = os.pidfd_open(os.getpid())
        arguments = [json.dumps(asdict(self.layout)), json.dumps(shared), str(owner), str(self.session)]
        with open(self.session / "cluster.log", "w") as log:
            self.process = subprocess.Popen(
                [*UNSHARE, sys.executable, "-I", str(CONTROLLER_PROGRAM), *arguments],
                env={"PATH": slurm_packages.SYSTEM_PATH, "LANG": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                pass_fds=[owner],
                start_new_session=True,  # Ctrl-C reaches the tests alone, and they end the cluster in order
            )
        os.close(owner)
        try:
            self.pids: dict[str, int] = self._answer()
        except BaseException:
            self.stop()
            raise
        self.write_programs(self.session / "bin", self.pids[CONTROLLER])
        return self

    def stop(self) -> None:
        """Returns when every process of the cluster is gone and its folder removed."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.session, ignore_errors=True)

    def __enter__(self) -> "Cluster":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Hosts and faults

    def on_host(self, name: str, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a program as root on a host, or on the controller, outside of jobs. options as in run()."""
        return self.run("nsenter", "--target", self.pids[name], "--all", *command, **options)

    def power_off(self, name: str) -> None:
        """Ends every process of a host at once, without a last packet to its peers."""
        self.touched.add(name)
        self._ask("power_off", name)
        self.off.add(name)

    def boot(self, name: str) -> None:
        """Powers a host on. It serves again some seconds later; wait_idle() waits for that."""
        self.pids[name] = self._ask("boot", name)
        self.off.discard(name)

    def cut(self, name: str) -> None:
        """Pulls a host's network cable; its processes live on."""
        self.touched.add(name)
        self.on_host(CONTROLLER, "ip", "link", "set", name, "down")

    def heal(self, name: str) -> None:
        """Plugs the cable in again, and has the controller look: by itself it does so within a minute."""
        self.on_host(CONTROLLER, "ip", "link", "set", name, "up")
        self.run("scontrol", "reconfigure")

    def kill_slurmd(self, name: str) -> None:
        """Ends slurmd alone: a job's processes on the host live on, and nobody can tell them to stop."""
        self.touched.add(name)
        self.on_host(name, "sh", "-c", f"kill -KILL $(cat {STATE}/run/slurmd.{name}.pid)")

    def start_slurmd(self, name: str) -> None:
        self._ask("start_slurmd", name)

    def set_down(self, name: str) -> None:
        """What an administrator does before pulling a host: its jobs end at once."""
        self.touched.add(name)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def resume(self, name: str) -> None:
        """Takes set_down() back."""
        self.run("scontrol", "update", f"nodename={name}", "state=resume")

    def reset(self) -> None:
        """Makes the cluster as new for the next test: no jobs, no stray processes, every host in service."""
        jobs = self.run("squeue", "-h", "-o", "%A").stdout.split()
        if jobs:
            self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)  # no time to say goodbye
            self.run("scancel", *jobs, check=False)
        for name in sorted(self.touched):
            self.set_down(name)  # the controller stops waiting for what the host still runs
            if name not in self.off:
                self._ask("power_off", name)  # and what outlived its job ends
            self.boot(name)
            self.resume(name)
        self.touched.clear()
        self.wait_idle()

    # For a failing test

    def describe(self) -> str:
        last_words = self.log("slurmctld").splitlines()[-25:]
        return "\n".join([super().describe(), *last_words])

    def log(self, daemon: str) -> str:
        """The log of slurmctld, slurmdbd or slurmd.<host>."""
        root = Path(f"/proc/{self.pids[CONTROLLER]}/root")
        return Path(f"{root}{STATE}/log/{daemon}.log").read_text(errors="replace")

    # Talking to the controller

    def _ask(self, *request: str) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        died = {"error": "it died: " + (self.session / "cluster.log").read_text()}
        answer = json.loads(line) if line else died
        if "error" in answer:
            raise RuntimeError(f"test cluster: {answer['error']}")
        return answer["result"]


if __name__ == "__main__":
    slurm_packages.ensure(install=False)
    with Cluster(shared=[Path.cwd()]) as cluster:
        command = sys.argv[1:] or [os.environ.get("SHELL", "/bin/sh")]
        sys.exit(subprocess.run(command, env={**os.environ, "PATH": cluster.path}).returncode)
