"""What a user on the login node of the test cluster does: submit, look, wait. Faults: slurm_cluster.py."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from slurm_packages import SYSTEM_PATH

PROGRAMS = ("sbatch", "srun", "salloc", "squeue", "scontrol", "scancel", "sacct", "sinfo", "sacctmgr")
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# Slurm's own words where a site keeps no accounts.
NO_ACCOUNTING = "Slurm accounting storage is disabled"
# And of a job that the controller has forgotten, MinJobAge after its end.
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"
# A job inherits the environment that submits it; these would tell it that it runs in another one.
HIDDEN = ("SLURM_", "SBATCH_", "SUBMITIT_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "MUSTER_")

T = TypeVar("T")


class Client:
    """Slurm's own client programs, started outside of the cluster's namespaces and working inside of them."""

    def write_programs(self, folder: Path, controller: int) -> None:
        """Fills folder with programs that become Slurm's own in the controller's network and file system.

        They replace themselves, so signals and exit codes are those of the real ones.
        """
        self.folder = folder
        folder.mkdir()
        for name in PROGRAMS:
            (folder / name).write_text(
                "#!/bin/sh\n"
                # Jobs inherit PATH, and on a host the real programs are right.
                f'case :$PATH in *:"{folder}:"*) PATH=${{PATH%%"{folder}:"*}}${{PATH#*"{folder}:"}} ;; esac\n'
                f"exec nsenter --target {controller} --mount --net --uts --ipc "
                f'env -C "$(pwd -P)" {name} "$@"\n'
            )
            (folder / name).chmod(0o755)

    @property
    def path(self) -> str:
        """A PATH on which sbatch and the others lead into the cluster; after them come the real ones."""
        return f"{self.folder}:{os.environ.get('PATH', '')}:{SYSTEM_PATH}"

    def run(self, *command: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a program as a user would. RuntimeError with its own words when it fails.

        options are subprocess.run's; `env` is added to this process's environment, with a clean slate of
        Slurm's and torch's variables.
        """
        words = [str(word) for word in command]
        env = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
        env |= {"PATH": self.path, **options.pop("env", {})}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=400, **options)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr}{done.stdout}")
        return done

    def sbatch(self, *arguments: object, **options: Any) -> str:
        """Submits, and returns the job's id. options as in run()."""
        return self.run("sbatch", "--parsable", *arguments, **options).stdout.strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job or a task of an array: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: str, *states: str, timeout_s: float = 240) -> dict[str, str]:
        """Waits until a job is in one of these states, any final one by default, and returns job()."""

        def arrived() -> dict[str, str] | None:
            job = self.job(job_id)
            return job if job["JobState"] in (states or FINAL_STATES) else None

        return self.until(f"job {job_id} {' or '.join(states) or 'ended'}", arrived, timeout_s)

    def wait_attempt(self, job_id: str, attempt: int, timeout_s: float = 240) -> dict[str, str]:
        """Waits until a job runs for the (attempt + 1)th time, and returns job()."""

        def arrived() -> dict[str, str] | None:
            job = self.job(job_id)
            return job if (job["JobState"], job["Restarts"]) == ("RUNNING", str(attempt)) else None

        return self.until(f"attempt {attempt} of job {job_id}", arrived, timeout_s)

    def until(self, what: str, ready: Callable[[], T | None], timeout_s: float = 240) -> T:
        """Polls ready() until it returns something true, and returns that.

        AssertionError, with the cluster's state, when it does not.
        """
        end = time.monotonic() + timeout_s
        while not (value := ready()):
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{self.describe()}")
            time.sleep(0.1)
        return value

    def host_states(self) -> dict[str, str]:
        """idle, mixed, allocated, down* (silent), ... by host."""
        listing = self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%N %T").stdout.split()
        return dict(zip(listing[::2], listing[1::2], strict=True))

    def wait_idle(self, timeout_s: float = 240) -> None:
        """Waits until no job is left and every host is in service."""

        def idle() -> bool:
            return not self.run("squeue", "-h").stdout and set(self.host_states().values()) == {"idle"}

        self.until("an idle cluster", idle, timeout_s)

    def describe(self) -> str:
        """Hosts and queue, as sinfo and squeue show them."""
        commands = (["sinfo", "-N", "--long"], ["squeue", "--long"])
        return "\n".join(self.run(*command, check=False).stdout for command in commands)

    def no_accounting(self) -> contextlib.AbstractContextManager[None]:
        """Inside, sacct answers as on a cluster without accounting."""
        return self._refusing(NO_ACCOUNTING, "sacct")

    def forgotten(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the controller knows no job any more."""
        return self._refusing(FORGOTTEN, "squeue", "scontrol")

    @contextlib.contextmanager
    def _refusing(self, words: str, *names: str) -> Iterator[None]:
        """Inside, these programs fail with these words."""
        texts = {self.folder / name: (self.folder / name).read_text() for name in names}
        for program in texts:
            program.write_text(f'#!/bin/sh\necho "{words}" >&2\nexit 1\n')
        try:
            yield
        finally:
            for program, text in texts.items():
                program.write_text(text)
