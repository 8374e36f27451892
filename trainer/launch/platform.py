"""What a platform must be able to do. A new one is a package, a template folder and a line of the registry."""

import importlib
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Generic, TypeVar

from trainer.config.job import Job
from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB, JobError, wrong_choice
from trainer.launch.far_folder import FarFolder
from trainer.run.folder import RunFolder

REGISTRY = {
    "local": "trainer.launch.local.platform:Local",
    "docker": "trainer.launch.docker.platform:Docker",
    "slurm": "trainer.launch.slurm.platform:Slurm",
    "kubernetes": "trainer.launch.kubernetes.platform:Kubernetes",
}

SiteT = TypeVar("SiteT")
RequestT = TypeVar("RequestT")


@dataclass(frozen=True)
class Plan(Generic[SiteT]):
    """One job, ready to become a request to its platform."""

    job: Job
    job_text: str
    """The merged job as YAML."""
    run: RunFolder
    """For a rendering, where it would be."""
    site: SiteT
    site_file: Path | None = None
    """Where `site` was read; None: the platform's own file."""
    job_folder: Path | None = None
    """Where the job file of a new run lies; user code may lie beside it."""

    def shell_lines(self, commands: Sequence[str], has_code: bool, files: Mapping[Path, str] = {}) -> list[str]:
        """Lines to paste into a shell: the commands, after those that make the run folder where it is not there.

        Below the commands is what they are handed: the job, and other `files` that are made before. `has_code`: ranks
        find the user's code in the run folder. A command that ends in `&` does not wait for its end.
        """
        words = {path: shlex.quote(str(path)) for path in (self.run.logs, self.run.events, self.run.code, *files)}
        first, notes = [], []
        if not self.run.source.exists():
            folders = [self.run.logs, self.run.events, *([self.run.code] if has_code else [])]
            first = ["umask go-w", f"mkdir -p {' '.join(words[folder] for folder in folders)}"]  # others must not write
            files = {self.run.job: self.job_text, **files}
            notes = [f"# Modules of your own belong in {words[self.run.code]}"] if has_code else []
        ends = {path: f"END_OF_{path.suffix[1:].upper()}" for path in files}
        made = [f"cat >{shlex.quote(str(path))} <<'{end}'" for path, end in ends.items()]
        *before, last = [*first, *made, *commands]
        # One line for the shell, which then reads the files one after the other.
        chain = [f"{command} \\" if command.endswith("&") else f"{command}; \\" for command in before]
        texts = [line for path, text in files.items() for line in (*text.splitlines(), ends[path])]
        return [*chain, last, *texts, *notes]


class Phase(str, Enum):
    """Where a submission stands."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    """Stopped on request with a checkpoint; nothing continues it by itself."""
    CANCELLED = "cancelled"
    LOST = "lost"
    """The platform does not know it any more, and the run folder holds no end."""
    UNKNOWN = "unknown"
    """The platform cannot be asked here and now: it may still run."""

    __str__ = str.__str__


@dataclass(frozen=True)
class JobStatus:
    """What the platform says about a submission."""

    phase: Phase
    reason: str = ""
    code: int | None = None

    waits: bool = False
    """Whether it runs, and something that it needs is not there yet: `reason` says what."""

    progress: dict[str, Any] = field(default_factory=dict)
    """`step`, `steps`, `attempt`, `metrics` as far as the platform knows them, where the run folder here does not."""

    @property
    def is_active(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self.phase in (Phase.PENDING, Phase.RUNNING, Phase.UNKNOWN)


class Platform(ABC, Generic[SiteT, RequestT]):
    """One way to run a job. `build` makes the request once; `render` prints it and `submit` sends it."""

    name: str
    folder: str
    """Where its templates are, `site.yaml` among them."""
    site_type: type[SiteT]
    ids: Mapping[str, str]
    """What its handles must hold, each with its pattern: what a file says must not become an option of a command."""
    poll_s = 0.0
    """For how long an answer is used again: following a run asks ten times a second. An object follows one run."""
    kept: tuple[float, JobStatus] | None = None
    """When the platform last answered, and what."""
    copies_logs = False
    """Whether asking it writes into the run folder, which only its owner may let it do: a log there can be a link."""
    speaks = False
    """Whether asking it prints how a run goes that is followed."""
    following = False
    """Whether the caller waits for the end, and sees everything meanwhile."""
    runs_code_of_here = True
    """Whether ranks run the user's code that is on this machine, so that it must be there."""
    asks_machine = False
    """Whether what it renders depends on the machine that it runs on: its devices, its engine."""
    has_arrays = False
    """Whether it has `submit_sweep`."""

    def load_site(self, path: Path | None) -> SiteT:
        """Read and check the site file; None: the platform's own. Raises JobError: unknown key or wrong value."""
        from trainer.launch.site import read_site  # here: `muster status` starts faster without

        return read_site(path, self.folder, self.site_type)

    def take_code(self, plan: Plan[SiteT]) -> None:
        """Copy the user's code into the run folder, where the request depends on it. Raises JobError."""

    @abstractmethod
    def build(self, plan: Plan[SiteT]) -> RequestT:
        """What the platform's own tool takes for this plan. Starts and changes nothing."""

    @abstractmethod
    def render(self, request: RequestT) -> str:
        """The request as text that can be pasted or piped into the platform's own tool."""

    @abstractmethod
    def submit(self, plan: Plan[SiteT], request: RequestT, follow: bool) -> dict[str, Any]:
        """Send the request; return the handle that `handle.json` keeps. `follow`: the caller waits for the end."""

    def called(self, handle: dict[str, Any]) -> str:
        """What the platform calls the submission, for people who want to ask it themselves."""
        return "/".join(str(handle[key]) for key in self.ids)

    def resources(self, plan: Plan[SiteT]) -> list[str]:
        """What the platform is asked for; the runs of an array ask for the same."""
        raise NotImplementedError

    def submit_sweep(self, plan: Plan[SiteT], runs: list[RunFolder]) -> list[dict[str, Any]]:
        """Submit several runs as one array; `plan.run` is the folder whose `sweep.json` names them."""
        raise NotImplementedError

    def find(self, run: RunFolder) -> list[dict[str, Any]]:
        """The handles of what the platform has of a run, the oldest first: whoever submitted it may have been killed.

        Raises JobError: it cannot be asked.
        """
        raise NotImplementedError

    def unfinished(self, plan: Plan[SiteT]) -> RunFolder | None:
        """The run whose submission was cut off, and which this plan completes."""
        return None

    def status(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """Where the submission stands; an answer that is younger than `poll_s` is given again."""
        if self.kept is None or time.monotonic() - self.kept[0] >= self.poll_s:
            try:
                status = self.ask(run, handle)
            except JobError as error:  # this machine lacks the platform's command, or nobody answers it
                status = JobStatus(Phase.UNKNOWN, str(error))
            self.kept = time.monotonic(), status
        return self.kept[1]

    @abstractmethod
    def ask(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """Ask where the submission stands."""

    def bring_rank_log(self, run: RunFolder, handle: dict[str, Any], rank: int | None) -> None:
        """Bring what a rank, or all nodes, printed into the run folder here, where the nodes have another one."""

    def reach(self, run: RunFolder, handle: dict[str, Any]) -> AbstractContextManager[FarFolder]:
        """The run folder where its nodes have it, while it is needed. Raises JobError: it is here, or no way there."""
        problem = f"is here already: on {self.name} the nodes write to it"
        raise JobError("RUN", str(run), problem, "See `muster status`, and the files in it")

    @abstractmethod
    def cancel(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Stop it, with a checkpoint, for good."""

    @abstractmethod
    def preempt(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Stop it as the platform's preemption would, and let it come back."""


def combined_exit_code(codes: list[int]) -> int:
    """One exit code for all nodes: the job is wrong, else it failed, else it was stopped, else it is done."""
    failed = [code for code in codes if code not in (DONE, STOPPED)]
    return WRONG_JOB if WRONG_JOB in codes else failed[0] if failed else max(codes, default=FAILED)


def own_program(name: str) -> list[str]:
    """The command of one of our programs in this environment, by the path of `muster.py`: see there."""
    return [sys.executable, str(Path(__file__).resolve().parents[2] / "muster.py"), name]


AnyPlatform = Platform[Any, Any]
AnyPlan = Plan[Any]


def find_platform(name: str) -> AnyPlatform:
    """The platform of that name. Raises JobError: there is none."""
    if name not in REGISTRY:
        raise wrong_choice("--on", name, list(REGISTRY))
    module, _, symbol = REGISTRY[name].partition(":")
    platform: AnyPlatform = getattr(importlib.import_module(module), symbol)()
    return platform


def platform_of(handle: dict[str, Any]) -> AnyPlatform:
    """The platform that gave a handle, which may be that of another machine. Raises JobError: there is none."""
    return reached(find_platform(str(handle.get("platform"))), "ssh" in handle)


def reached(platform: AnyPlatform, by_ssh: bool) -> AnyPlatform:
    """The platform, of this machine or of another."""
    if not by_ssh:
        return platform
    from trainer.launch.ssh.platform import OverSsh  # here: the others start faster without

    return OverSsh(platform)


def site_fact(error: JobError, wanted: str) -> JobError | None:
    """The error for a key of a job that belongs into the site file, of the `wanted` platform or another; else None."""
    for name in sorted(REGISTRY, key=wanted.__ne__):
        keys = getattr(find_platform(name), "site_type", None)
        if keys and "unknown key" in error.problem and error.key in keys.__dataclass_fields__:
            problem = f"is a fact of the site, not of the job: a key of {name}'s site file"
            remedy = f"Write `{error.key}: ...` into a file, and add --on {name} --site FILE"
            return JobError(error.key, error.value, problem, remedy)
    return None
