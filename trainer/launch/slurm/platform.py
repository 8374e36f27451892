"""The Slurm platform: `slurm/job.sbatch` as it stands, submitted through a submitit executor."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from trainer.errors import JobError
from trainer.launch.fabric import fabric_environment
from trainer.launch.platform import Plan, Platform, State
from trainer.launch.runs import check_files, make_run_by_hand
from trainer.launch.site import read_site, template
from trainer.launch.slurm.state import SlurmState, run_client
from trainer.launch.snapshot import take_snapshot

POLL_S = 5.0
"""How old an answer of the controller may be: who follows a run asks ten times a second."""
SAVE_MARGIN_S = 30
"""Between our grace period and Slurm's: the batch script requeues in it."""

UNREACHABLE = re.compile("Unable to contact slurm controller|Could not establish a configuration source")
"""What sbatch says when nobody answers it: neither the site file nor the job is wrong then."""


@dataclass
class SlurmSite:
    """`slurm/site.yaml`: see there for what each key means."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time_limit_min: int | None = None
    memory_gb: int | None = None
    cpus_per_device: int | None = None
    gpus: str = "auto"
    runs: str | None = None
    python: str | None = None
    setup: str | None = None
    fabric: str = "none"
    sbatch_args: list[str] = field(default_factory=list)
    srun_args: list[str] = field(default_factory=list)
    runtime: str = "none"
    image: str | None = None
    mounts: list[str] = field(default_factory=list)


class TemplateExecutor(SlurmExecutor):
    """submitit's Slurm executor, submitting our template with our command line instead of a generated script."""

    def __init__(self, folder: Path, flags: list[str], words: list[str], nodes: int) -> None:
        """`flags`: of sbatch; `words`: what follows the script."""
        super().__init__(folder)
        self.flags, self.words = flags, words
        self.parameters = {"nodes": nodes, "ntasks_per_node": 1}

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return template("slurm", "job.sbatch").read_text()

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self.flags, str(submission_file_path), *self.words]


class Slurm(Platform):
    """A cluster under Slurm, reached by its client commands."""

    name = "slurm"
    arrays = True

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.asked: tuple[float, str, State] | None = None

    def load_site(self, path: Path | None) -> dict[str, Any]:
        """Read and check `slurm/site.yaml` or the given file."""
        site = read_site(path, "slurm", SlurmSite)
        if site.runtime not in ("none", "pyxis", "apptainer"):
            raise JobError("runtime", site.runtime, "is none of none, pyxis, apptainer", "Choose one of them")
        if site.gpus not in ("auto", "none") and "{n}" not in site.gpus:
            raise JobError(
                "gpus", site.gpus, "is neither auto nor none", "Or give an option with {n}: --gres=gpu:a100:{n}"
            )
        if site.runtime != "none" and not site.image:
            raise JobError("image", site.image, f"runtime={site.runtime} needs one", "Name the image")
        if site.runtime == "none" and (site.image or site.mounts):
            raise JobError("image", site.image, "would be ignored: runtime=none", "Set runtime, or remove it")
        fabric_environment(site.fabric)
        return asdict(site)

    def render(self, plan: Plan) -> str:
        """The script and the sbatch command line, as they can be typed."""
        site = SlurmSite(**plan.site)
        script = plan.run / "job.sbatch"
        exports = ["env", *(f"{name}={value}" for name, value in self.exports(site).items())]
        line = ["sbatch", *self.flags(plan, site), str(script), *self.words(plan, site)]
        return "\n".join([
            *make_run_by_hand(plan.run, plan.config, True),
            f"cat >{shlex.quote(str(script))} <<'END_OF_SCRIPT'",
            f"{template('slurm', 'job.sbatch').read_text()}END_OF_SCRIPT",
            shlex.join([*exports, *line] if exports[1:] else line),
        ])  # fmt: skip

    def flags(self, plan: Plan, site: SlurmSite) -> list[str]:
        """Options of sbatch: the job's counts, the site's facts."""
        job = plan.job
        grace = math.ceil(job.agent.grace_s) + SAVE_MARGIN_S
        if site.time_limit_min is not None:  # a notice before the first step would end every attempt there
            grace = min(grace, site.time_limit_min * 30)
        flags = [
            f"--job-name={job.name}", f"--nodes={job.nodes}", f"--signal=USR2@{grace}",
            f"--chdir={plan.run / 'code'}", f"--output={plan.run / 'logs' / 'slurm-%j.out'}",
        ]  # fmt: skip
        for key in ("partition", "account", "qos", "constraint", "reservation"):
            value = getattr(site, key)
            if value is not None:
                flags.append(f"--{key}={value}")
        if site.time_limit_min is not None:
            flags.append(f"--time={site.time_limit_min}")
        if site.memory_gb is not None:
            flags.append(f"--mem={site.memory_gb}G")
        if site.cpus_per_device is not None:
            flags.append(f"--cpus-per-task={site.cpus_per_device * job.devices_per_node}")
        if job.device != "cpu" and site.gpus != "none":
            form = "--gpus-per-node={n}" if site.gpus == "auto" else site.gpus
            flags.append(form.format(n=job.devices_per_node))
        return [*flags, *site.sbatch_args]

    def words(self, plan: Plan, site: SlurmSite, target: Path | None = None) -> list[str]:
        """What follows the script: options of srun, then the agent's command."""
        logs = plan.run / "logs" / "node-%n.log"
        words = [f"--output={logs}", *site.srun_args]
        python = site.python or (sys.executable if site.runtime == "none" else "python")
        command = [python, "-m", "trainer", str(target or plan.run / "job.yaml")]
        mounts = [f"{plan.run.parent}:{plan.run.parent}", *site.mounts]  # the runs of a sweep lie beside its folder
        if site.runtime == "pyxis":
            names = sorted({*self.exports(site), "MUSTER_SETUP"} - {"MUSTER_SETUP"})
            words += [f"--container-image={site.image}", f"--container-mounts={','.join(mounts)}",
                      f"--container-workdir={plan.run / 'code'}"]  # fmt: skip
            if names:  # under pyxis the image's ENV would win over the job's
                words.append(f"--container-env={','.join(names)}")
        elif site.runtime == "apptainer":
            binds = [word for mount in mounts for word in ("--bind", mount)]
            command = ["apptainer", "exec", "--nv", *binds, "--pwd", str(plan.run / "code"), str(site.image), *command]
        return [*words, *command]

    def exports(self, site: SlurmSite) -> dict[str, str]:
        """Variables that go with the job."""
        setup = {"MUSTER_SETUP": str(Path(site.setup).resolve())} if site.setup else {}
        return {**fabric_environment(site.fabric), **setup}

    def submit(self, plan: Plan, follow: bool) -> dict[str, Any]:
        """Submit by sbatch; Slurm's own refusal is shown once.

        Raises:
            JobError: no Slurm here, or Slurm refused.
        """
        site = SlurmSite(**plan.site)
        return self._sbatch(plan, site, self.flags(plan, site), self.words(plan, site))

    def submit_sweep(self, plan: Plan, runs: list[Path]) -> list[dict[str, Any]]:
        """Submit one array whose task i is run i."""
        site = SlurmSite(**plan.site)
        flags = [flag for flag in self.flags(plan, site) if not flag.startswith("--output=")]
        flags += [f"--array=0-{len(runs) - 1}", f"--output={plan.run / 'logs' / 'slurm-%A_%a.out'}"]
        words = self.words(plan, site, target=plan.run)
        words[0] = f"--output={plan.run / 'logs' / 'task-%a-node-%n.log'}"
        array = self._sbatch(plan, site, flags, words)["job_id"]
        for index, run in enumerate(runs):  # Slurm writes them beside the array; a run's own folder leads to them
            links = {f"node-{node}.log": f"task-{index}-node-{node}.log" for node in range(plan.job.nodes)}
            links[f"slurm-{array}_{index}.out"] = f"slurm-{array}_{index}.out"
            (run / "code").symlink_to(Path("..", plan.run.name, "code"))
            for name, target in links.items():
                (run / "logs" / name).symlink_to(Path("../..", plan.run.name, "logs", target))
        return [{"job_id": f"{array}_{index}"} for index in range(len(runs))]

    def _sbatch(self, plan: Plan, site: SlurmSite, flags: list[str], words: list[str]) -> dict[str, Any]:
        if shutil.which("sbatch") is None:
            raise JobError(
                "--on", "slurm", "there is no sbatch on this machine", "Submit from a login node of the cluster"
            )
        check_files(plan.job, plan.run, take_snapshot(Path.cwd(), plan.run), False)
        folder = plan.run / "plan"
        folder.mkdir(mode=0o700, exist_ok=True)
        # submitit reads pickles from such folders: nobody else may write there.
        if folder.stat().st_uid != os.geteuid():
            raise JobError("RUN", str(plan.run), "belongs to another user", "Submit its job file as your own")
        folder.chmod(0o700)
        executor = TemplateExecutor(folder, flags, words, plan.job.nodes)
        try:
            with _clean_environment(self.exports(site)), contextlib.redirect_stderr(open(os.devnull, "w")):
                job = executor._submit_command("")
        except FailedJobError as error:
            text = " ".join(str(error).split())
            if UNREACHABLE.search(text):
                raise JobError(
                    "--on", "slurm", text, "Wait until `scontrol ping` says that the controller is up"
                ) from None
            raise JobError(
                "sbatch", shlex.join(flags), f"Slurm refused: {text}", "Correct slurm/site.yaml or the job"
            ) from None
        return {"job_id": job.job_id}

    def state(self, run: Path, handle: dict[str, Any]) -> State:
        """By squeue, scontrol, sacct and the run folder, whichever knows."""
        job_id = str(handle["job_id"])
        if self.asked and self.asked[1] == job_id and time.monotonic() - self.asked[0] < POLL_S:
            return self.asked[2]
        state = SlurmState(run, job_id, bool(handle.get("cancelled"))).read()
        self.asked = time.monotonic(), job_id, state
        return state

    def cancel(self, run: Path, handle: dict[str, Any]) -> None:
        """scancel: the agents save within Slurm's KillWait."""
        for pause_s in (1, 0):  # a requeue by the batch script in the same moment would bring the job back to life
            run_client(["scancel", str(handle["job_id"])])
            time.sleep(pause_s)
        self.asked = None

    def preempt(self, run: Path, handle: dict[str, Any]) -> None:
        """Send what Slurm sends before a preemption; the batch script requeues."""
        run_client(["scancel", "--signal=USR2", str(handle["job_id"])])
        self.asked = None


@contextlib.contextmanager
def _clean_environment(exports: dict[str, str]) -> Iterator[None]:
    """Let sbatch see the environment without what an enclosing job or a GPU mask left in it."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "MUSTER_", "SUBMITIT_")) and name != "SLURM_CONF":
            del os.environ[name]
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ.update(exports)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
