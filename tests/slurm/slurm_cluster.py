"""A real Slurm cluster on one machine: several hosts, each with its own network, name, address, /tmp and /dev/shm.

    with Cluster(shared=[checkout]) as cluster:
        job = cluster.sbatch("--nodes=2", script)
        cluster.power_off("n2")

As a program it brings one up, runs a command (or a shell) with Slurm's client programs on PATH, and takes it
down: python tests/slurm/slurm_cluster.py sinfo
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from slurm_config import CONTROLLER, STATE, Layout
from slurm_packages import SYSTEM_PATH

CLIENTS = ("sbatch", "srun", "salloc", "squeue", "scontrol", "scancel", "sacct", "sinfo", "sacctmgr")
INSIDE = Path(__file__).with_name("slurm_inside.py")
# Slurm's own words where a site keeps no accounts.
NO_ACCOUNTING = '#!/bin/sh\necho "Slurm accounting storage is disabled" >&2\nexit 1\n'
# What a job must not learn from the process that submits it: another job's variables, and our client programs.
HIDDEN_PREFIXES = ("SLURM_", "SBATCH_", "SUBMITIT_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTEST_")


class Cluster:
    """Owns the cluster from start() to stop(). It ends with this process too, however that ends."""

    def __init__(self, layout: Layout | None = None, shared: list[Path] | None = None):
        self.layout = replace(layout or Layout(), first_job_id=random.randrange(1000, 600_000, 10))
        # Visible on every host even where it lies under /tmp, of which every host has its own.
        self.shared = [Path(path).resolve() for path in [*(shared or []), sys.prefix, sys.base_prefix]]
        self.touched: set[str] = set()  # hosts that reset() must power-cycle
        self.off: set[str] = set()

    # Life

    def start(self) -> "Cluster":
        self.folder = Path(tempfile.mkdtemp(prefix="muster-slurm-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        shared = [str(path) for path in [*self.shared, self.folder]]
        owner = os.pidfd_open(os.getpid())
        try:
            with open(self.folder / "cluster.log", "w") as log:
                self.process = subprocess.Popen(
                    [
                        *"setsid unshare --mount --net --pid --uts --ipc --fork --kill-child=KILL".split(),
                        *[sys.executable, "-I", str(INSIDE), "controller", json.dumps(asdict(self.layout))],
                        *[json.dumps(shared), str(owner), str(self.folder)],
                    ],
                    env={"PATH": SYSTEM_PATH, "LANG": "C.UTF-8"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    pass_fds=[owner],
                )
        finally:
            os.close(owner)
        try:
            self.pids: dict[str, int] = self._answer()
        except BaseException:
            self.stop()
            raise
        self._write_clients()
        return self

    def stop(self) -> None:
        """Ends the cluster and returns when every process of it is gone and its folder removed."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "Cluster":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Slurm's own client programs

    @property
    def path(self) -> str:
        """A PATH on which sbatch and the others lead into the cluster."""
        return f"{self.folder / 'bin'}:{os.environ.get('PATH', SYSTEM_PATH)}"

    def run(self, *command: object, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Runs a program as a user on the login node would. RuntimeError with its own words when it fails."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(HIDDEN_PREFIXES)}
        env |= {"PATH": self.path, **options.pop("env", {})}
        done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=60, **options)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr}{done.stdout}")
        return done

    def sbatch(self, *arguments: object, **options) -> str:
        """Submits, and returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **options).stdout.strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller itself knows of a job: JobState, Restarts, ExitCode, NodeList, Reason, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: str, *states: str, timeout_s: float = 60) -> dict[str, str]:
        """Waits until a job is in one of these states (any final one by default) and returns job()."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        return self.until(
            f"job {job_id} in {' or '.join(wanted)}", lambda: (j := self.job(job_id))["JobState"] in wanted and j, timeout_s
        )

    def until(self, what: str, ready, timeout_s: float = 60):
        """Polls ready() until it returns something true, and returns that. AssertionError with the cluster's state."""
        end = time.monotonic() + timeout_s
        while not (value := ready()):
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{self.describe()}")
            time.sleep(0.1)
        return value

    def describe(self) -> str:
        """The cluster's state and the controller's last words, for a failing test."""
        state = [self.run(*command.split(), check=False).stdout for command in ("sinfo -N -l", "squeue --long")]
        return "\n".join([*state, *self.log("slurmctld").splitlines()[-25:]])

    def log(self, daemon: str) -> str:
        """The log of slurmctld, slurmdbd or slurmd.<host>."""
        return Path(f"/proc/{self.pids[CONTROLLER]}/root{STATE}/log/{daemon}.log").read_text(errors="replace")

    @contextlib.contextmanager
    def no_accounting(self):
        """Inside, sacct answers as on a cluster without accounting."""
        client = self.folder / "bin/sacct"
        text = client.read_text()
        client.write_text(NO_ACCOUNTING)
        try:
            yield
        finally:
            client.write_text(text)

    # Hosts and faults

    def on_host(self, name: str, *command: object, **options) -> subprocess.CompletedProcess:
        """Runs a program as root on a host, outside of every job."""
        return self.run("nsenter", "--target", self.pids[name], "--all", *command, **options)

    def power_off(self, name: str) -> None:
        """Ends every process of a host at once, without a last packet to its peers."""
        self._ask("power_off", name)
        self.touched.add(name)
        self.off.add(name)

    def boot(self, name: str) -> None:
        self.pids[name] = self._ask("boot", name)
        self.off.discard(name)

    def cut(self, name: str) -> None:
        """Pulls a host's network cable; its processes live on."""
        self.touched.add(name)
        self._in_controller("ip", "link", "set", name, "down")

    def heal(self, name: str) -> None:
        """Plugs the cable in again. The host is asked at once to register, which by itself takes up to a minute."""
        self._in_controller("ip", "link", "set", name, "up")
        self.run("scontrol", "reconfigure")

    def kill_slurmd(self, name: str) -> None:
        """Ends slurmd alone: the job's processes on the host live on, and nobody can tell."""
        self.touched.add(name)
        self.on_host(name, "sh", "-c", f"kill -KILL $(cat {STATE}/run/slurmd.{name}.pid)")

    def start_slurmd(self, name: str) -> None:
        self._ask("start_slurmd", name)

    def set_down(self, name: str) -> None:
        """What an administrator does before pulling a host: its jobs end there at once."""
        self.touched.add(name)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def resume(self, name: str) -> None:
        self.run("scontrol", "update", f"nodename={name}", "state=resume")

    def host_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%N %T").stdout.splitlines()
        return {name: state for name, state in (line.split() for line in lines)}

    def wait_idle(self, timeout_s: float = 60) -> None:
        """Waits until no job is left and every host is in service."""
        self.until(
            "all hosts idle",
            lambda: not self.run("squeue", "-h").stdout and set(self.host_states().values()) == {"idle"},
            timeout_s,
        )

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

    # How it works

    def _ask(self, *request: str):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it died: " + (self.folder / "cluster.log").read_text()}
        if "error" in answer:
            raise RuntimeError(f"test cluster: {answer['error']}")
        return answer["result"]

    def _in_controller(self, *command: str) -> None:
        self.run("nsenter", "--target", self.pids[CONTROLLER], "--all", *command)

    def _write_clients(self) -> None:
        """Puts programs on PATH that become Slurm's own inside the controller's namespaces, signals and exit codes kept."""
        folder = self.folder / "bin"
        folder.mkdir()
        for name in CLIENTS:
            client = folder / name
            client.write_text(
                "#!/bin/sh\n"
                f"PATH=${{PATH#{folder}:}}\n"  # a job inherits PATH, and on a host the programs are the real ones
                f"exec nsenter --target {self.pids[CONTROLLER]} --mount --net --uts --ipc "
                f'env -C "$(pwd -P)" {name} "$@"\n'
            )
            client.chmod(0o755)


if __name__ == "__main__":
    with Cluster(shared=[Path.cwd()]) as cluster:
        command = sys.argv[1:] or [os.environ.get("SHELL", "/bin/sh")]
        sys.exit(subprocess.run(command, env={**os.environ, "PATH": cluster.path}).returncode)
