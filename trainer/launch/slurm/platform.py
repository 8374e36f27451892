"""The Slurm platform: `slurm/job.sbatch` as it stands, submitted through a submitit executor."""

import contextlib
import math
import os
import re
import shlex
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit.core.utils import CommandFunction, FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from trainer.errors import JobError, MaybeAccepted
from trainer.launch.platform import JobStatus, Plan, Platform, own_program
from trainer.launch.site import SSH_FOLDER, check_rules, fabric_environment, ssh_rules, template
from trainer.launch.slurm.state import SlurmJob, run_client
from trainer.launch.snapshot import check_files, take_snapshot
from trainer.run.folder import RunFolder
from trainer.wiring.variables import SETUP, without_job

SAVE_MARGIN_S = 30
"""Seconds between the end of our grace period and Slurm's kill, in which the batch script requeues."""
UNREACHABLE = "Unable to contact slurm controller|Could not establish a configuration source"
"""What sbatch says when no controller answers; then neither the site file nor the job is wrong."""
LATE = "timed out|Zero Bytes were transmitted"
"""What it says when the controller may have taken the job, though its answer did not come."""


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
    ssh: str | None = None
    ssh_config: str | None = None
    ssh_folder: str = SSH_FOLDER

    def check(self) -> None:
        """Refuse keys that contradict each other. Raises JobError: they do."""
        plain, runtimes = self.runtime == "none", ("none", "pyxis", "apptainer")
        check_rules([
            *ssh_rules(self),
            (self.runtime not in runtimes, "runtime", self.runtime, "must be one of " + ", ".join(runtimes),
             "Choose one of them"),
            (self.gpus not in ("auto", "none") and "{n}" not in self.gpus, "gpus", self.gpus,
             "must be auto, none or an option with {n}", "For example --gres=gpu:a100:{n}"),
            (not plain and not self.image, "image", self.image, f"runtime={self.runtime} needs an image", "Set image"),
            (plain and bool(self.image or self.mounts), "image", self.image,
             "would be ignored, because runtime is none", "Set runtime, or remove image and mounts"),
        ])  # fmt: skip


@dataclass(frozen=True)
class SlurmRequest:
    """What sbatch takes: `sbatch FLAGS SCRIPT ARGUMENTS`, and variables of its environment."""

    plan: Plan[SlurmSite]
    environment: dict[str, str]
    flags: list[str]
    script: str
    """Its text."""
    script_path: Path
    """Where a rendering writes it."""
    arguments: list[str]
    """Options of srun, then the agent's command."""

    def argv(self, script: Path) -> list[str]:
        """The command line; `script`: the file with the script's text."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return [*(["env", *variables] if variables else []), "sbatch", *self.flags, str(script), *self.arguments]


class TemplateExecutor(SlurmExecutor):
    """submitit's Slurm executor with our script and command line, for which it has private methods only."""

    def __init__(self, folder: Path, request: SlurmRequest) -> None:
        super().__init__(folder)  # where it keeps the script
        self.request = request

    @classmethod
    def affinity(cls) -> int:
        """Whether submitit may submit here. It looks for srun, which our script calls on the nodes only."""
        return -1 if shutil.which("sbatch") is None else 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.request.script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        inherited = [f"--unset={name}" for name in sorted(os.environ.keys() - without_job().keys())]
        return ["env", *inherited, *self.request.argv(submission_file_path)]


class Slurm(Platform[SlurmSite, SlurmRequest]):
    name = folder = "slurm"
    site_type = SlurmSite
    ids = {"job_id": "[0-9]+(_[0-9]+)?"}  # noqa: RUF012
    poll_s = 5.0
    has_arrays = True

    def build(self, plan: Plan[SlurmSite]) -> SlurmRequest:
        return self._build(plan, "slurm-%j.out", "node-%n.log", plan.run.job)

    def _build(self, plan: Plan[SlurmSite], log: str, node_log: str, target: Path, *flags: str) -> SlurmRequest:
        environment, logs = fabric_environment(plan.site.fabric), plan.run.logs
        if plan.site.setup:
            setup = plan.site.setup  # of another machine, only that one knows the whole path
            environment |= {SETUP: setup if plan.site.ssh else str(Path(setup).resolve())}
        return SlurmRequest(
            plan, environment, _flags(plan, _pattern(logs, log), *flags),
            template("slurm", "job.sbatch").read_text(), plan.run.path / "job.sbatch",
            _arguments(plan, environment, _pattern(logs, node_log), target),
        )  # fmt: skip

    def render(self, request: SlurmRequest) -> str:
        files = {request.script_path: request.script}
        return "\n".join(request.plan.shell_lines([shlex.join(request.argv(request.script_path))], True, files))

    def submit(self, plan: Plan[SlurmSite], request: SlurmRequest, follow: bool) -> dict[str, Any]:
        """Submit by sbatch; Slurm's own refusal is shown once. Raises JobError: no Slurm here, or Slurm refused."""
        return {"job_id": _send(plan, request)}

    def resources(self, plan: Plan[SlurmSite]) -> list[str]:
        """The options of sbatch that are not about names."""
        return [flag for flag in _flags(plan, "") if not flag.startswith(("--job-name=", "--chdir=", "--output="))]

    def submit_sweep(self, plan: Plan[SlurmSite], runs: list[RunFolder]) -> list[dict[str, Any]]:
        """Submit one array whose task i is run i."""
        flag, names = f"--array=0-{len(runs) - 1}", ("slurm-%A_%a.out", "task-%a-node-%n.log")
        array = _send(plan, self._build(plan, *names, plan.run.path, flag))
        for index, run in enumerate(runs):  # Slurm writes the logs beside the array; links lead to them
            links = {f"node-{node}.log": f"task-{index}-node-{node}.log" for node in range(plan.job.nodes)}
            links[f"slurm-{array}_{index}.out"] = f"slurm-{array}_{index}.out"
            run.code.symlink_to(Path("..", plan.run.name, "code"))
            for name, target in links.items():
                (run.logs / name).symlink_to(Path("../..", plan.run.name, "logs", target))
        return [{"job_id": f"{array}_{index}"} for index in range(len(runs))]

    def called(self, handle: dict[str, Any]) -> str:
        return f"job {handle['job_id']}"

    def find(self, run: RunFolder) -> list[dict[str, Any]]:
        """By the working directory, which no other run's jobs have, and by the logs of jobs that Slurm forgot."""
        mine, words = f"--user={os.getuid()}", ("squeue", "--noheader", "--states=all", "--format=%i|%Z")
        listed = run_client(*words, mine).splitlines()
        with contextlib.suppress(JobError):  # there may be no accounts
            since = f"--starttime={time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(run.path.stat().st_ctime - 60))}"
            listed += run_client("sacct", "-X", "-n", "-P", mine, since, "--format=JobID,WorkDir").splitlines()
        found = {job for job, _, folder in (line.partition("|") for line in listed) if folder == str(run.code)}
        found |= {path.stem.partition("-")[2] for path in run.logs.glob("slurm-*.out")}
        return [{"job_id": job} for job in sorted(found, key=lambda job: int(job.partition("_")[0]))]

    def ask(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        return SlurmJob(run, str(handle["job_id"]), bool(handle.get("cancelled"))).status()

    def cancel(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """scancel: the agents save within Slurm's KillWait."""
        for pause_s in (1, 0):  # twice, because the batch script may requeue the job at the same moment
            run_client("scancel", "--", str(handle["job_id"]))
            time.sleep(pause_s)
        self.kept = None

    def preempt(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Send what Slurm sends before a preemption; the batch script requeues."""
        run_client("scancel", "--signal=USR2", "--", str(handle["job_id"]))
        self.kept = None


def _pattern(folder: Path, name: str) -> str:
    """A file for Slurm's --output, where `name` may hold patterns and the folder's own name must not."""
    return f"{str(folder).replace('%', '%%')}/{name}"


def _flags(plan: Plan[SlurmSite], log: str, *more: str) -> list[str]:
    """Options of sbatch: the job's counts, then the site's facts, then what the site adds and so wins."""
    job, site = plan.job, plan.site
    grace = math.ceil(job.agent.grace_s) + SAVE_MARGIN_S
    if site.time_limit_min is not None:  # a notice before the first step would end every attempt there
        grace = min(grace, site.time_limit_min * 30)
    flags = [
        f"--job-name={job.name}", f"--nodes={job.nodes}", f"--signal=USR2@{grace}",
        f"--chdir={plan.run.code}", f"--output={log}",
    ]  # fmt: skip
    options = {
        "partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint,
        "reservation": site.reservation, "time": site.time_limit_min,
        "mem": None if site.memory_gb is None else f"{site.memory_gb}G",
        "cpus-per-task": None if site.cpus_per_device is None else site.cpus_per_device * job.devices_per_node,
    }  # fmt: skip
    flags += [f"--{name}={value}" for name, value in options.items() if value is not None]
    if job.device != "cpu" and site.gpus != "none":
        form = "--gpus-per-node={n}" if site.gpus == "auto" else site.gpus
        flags.append(form.format(n=job.devices_per_node))
    return [*flags, *site.sbatch_args, *more]


def _arguments(plan: Plan[SlurmSite], environment: dict[str, str], log: str, target: Path) -> list[str]:
    """Options of srun, then the agent's command; `target`: the job file, or the folder of a sweep."""
    site, code = plan.site, str(plan.run.code)
    options = [f"--output={log}", *site.srun_args]
    elsewhere = site.python or (None if site.runtime == "none" else "python")
    agent = [elsewhere, "-m", "muster", "agent"] if elsewhere else own_program("agent")
    command = [*agent, str(target)]
    runs = plan.run.path.parent  # the runs of a sweep are beside its folder
    mounts = [f"{runs}:{runs}", *site.mounts]
    if site.runtime != "none" and set(str(runs)) & set(":,"):
        problem = f"{site.runtime} separates mounts by ':' and ','"
        raise JobError("runs", str(runs), problem, "Give a folder without them: runs=...")
    if site.runtime == "pyxis":
        options += [f"--container-image={site.image}", f"--container-mounts={','.join(mounts)}",
                    f"--container-workdir={code}"]  # fmt: skip
        names = sorted(set(environment) - {SETUP})
        if names:  # otherwise the ENV of the image would win over the job's variables
            options.append(f"--container-env={','.join(names)}")
    elif site.runtime == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        command = ["apptainer", "exec", "--nv", *binds, "--pwd", code, str(site.image), *command]
    return [*options, *command]


def _send(plan: Plan[SlurmSite], request: SlurmRequest) -> str:
    """Run sbatch; return the job's id. Raises JobError: no Slurm here, or Slurm refused."""
    if shutil.which("sbatch") is None:
        raise JobError("--on", "slurm", "this machine has no sbatch", "Submit from a login node of the cluster")
    check_files(plan.job, plan.run, take_snapshot(Path.cwd(), plan.run, plan.job), False)
    folder = plan.run.plan  # submitit reads pickles from such folders, so nobody else may write there
    folder.chmod(0o700)
    try:
        with contextlib.redirect_stderr(open(os.devnull, "w")):  # submitit prints the error that it raises
            # submitit keeps what it is given beside the script; the nodes run the script alone.
            kept = CommandFunction(request.argv(request.script_path))
            return str(TemplateExecutor(folder, request).submit(kept).job_id)
    except FailedJobError as error:
        text = " ".join(str(error).split())
    if re.search(LATE, text, re.IGNORECASE):
        raise MaybeAccepted("--on", "slurm", text, "`squeue --me` says whether Slurm took the job all the same")
    if re.search(UNREACHABLE, text):
        raise JobError("--on", "slurm", text, "Wait until `scontrol ping` says that the controller is up")
    raise JobError("sbatch", shlex.join(request.flags), f"Slurm refused: {text}", "Correct slurm/site.yaml or the job")
