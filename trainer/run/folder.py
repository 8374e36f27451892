"""The run folder: the name and the meaning of every file in it. No other module knows them.

Never imports torch: both sides of a submission use it. What the files hold is written by those who know: events in
`trainer.run.events`, checkpoints in `trainer.checkpoint`, a plan by its platform.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import JobError
from trainer.records import NOT_OURS, read_json, write_json, write_text
from trainer.run import event_files
from trainer.run.abilities import check_abilities
from trainer.run.event_files import Event
from trainer.run.events import EVENTS
from trainer.run.line_file import LineFile, warn
from trainer.wiring.variables import RUN, SLURM_ARRAY_TASK_ID, array_task, read_path

JOB = "job.yaml"
CHECKPOINT = re.compile(r"step-([0-9]{9,})")
"""The name of a committed checkpoint's folder. What is called otherwise is not ours to read or to remove."""

HUNDRED = 100
"""Ranks whose logs are in one folder."""


@dataclass(frozen=True)
class Entry:
    """A file or folder that a run folder has one of."""

    name: str
    meaning: str

    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Making the object touches no disk."""

    path: Path

    # What was asked for.
    job = Entry(JOB, "The merged job. Interpolations stay as written.")
    plan = Entry("plan", "A folder: what was submitted, and what submitit keeps.")
    source = Entry("plan/source.json", "The working directory, the job file's folder and the run's own at submission.")
    platform = Entry("plan/platform.json", "The platform and the site file; known before the job is accepted.")
    code = Entry("code", "A folder: the snapshot of the user's code.")
    code_archive = Entry("code.tar.gz", "The same, packed: on the claim of a Kubernetes run whose code is large.")
    handle = Entry("handle.json", "The platform, and its name for the job.")
    secret = Entry("secret", "By which the agents of the run know each other: for its owner's eyes alone.")
    sweep = Entry("sweep.json", "The runs of a sweep, and the value of each; only in the folder of one.")
    part_of = Entry("plan/sweep.json", "The folder of the sweep whose turns this run takes part in.")

    # What happened.
    events = Entry("events", "A folder: a file for each writer of events. See `trainer.run.events`.")
    old_events = Entry("events.jsonl", "The events of older versions, in one file.")
    metrics = Entry("metrics.jsonl", "A line for each logged training step and each evaluation.")
    evaluation = Entry("evaluation.json", "What the last evaluation measured.")
    tensorboard = Entry("tensorboard", "A folder: the same values for TensorBoard.")
    profile = Entry("profile", "A folder: profiler traces.")
    checkpoints = Entry("checkpoints", "A folder: `step-*`, each committed by its rename.")
    attempts = Entry("attempts", "A folder: a file for each attempt, of which the newest owns the run.")
    failures = Entry("failures", "A folder: what each failed rank says of its exception.")
    result = Entry("result.json", "The last evaluation, speed and memory of a run that is done.")
    failure = Entry("failure.json", "Why the run failed.")
    exit = Entry("exit.json", "The exit code that a local or Docker run ended with.")
    reserve = Entry(".reserve", "Room on the disk for the last word; removed before that is written.")
    lock = Entry(".lock", "Held by the supervisor of a local or Docker run while it lives.")
    pull = Entry(".pull", "A folder: what `muster pull` has not brought whole yet.")
    logs = Entry("logs", "A folder: logs of nodes, ranks and the supervisor.")

    def __str__(self) -> str:
        return str(self.path)

    __fspath__ = __str__

    @property
    def name(self) -> str:
        """`<job>-<id>`."""
        return self.path.name

    def rank_log(self, rank: int) -> Path:
        """Everything that a rank printed, in all attempts."""
        return self._logs_of(rank) / f"rank-{rank}.log"

    def node_log(self, node: int | str) -> Path:
        """What an agent printed; `node` may be a pattern, such as Slurm's `%n`."""
        return self.logs / f"node-{node}.log"

    def stacks(self, rank: int) -> Path:
        """The Python stacks of a rank, if it or another one hung."""
        return self._logs_of(rank) / f"stacks-rank-{rank}.txt"

    def _logs_of(self, rank: int) -> Path:
        """The folder of logs; of many ranks one for each hundred, such as `ranks-4700`: all make files there."""
        hundred = rank // HUNDRED * HUNDRED
        return self.logs / f"ranks-{hundred}" if hundred else self.logs

    def logs_of_ranks(self, rank: int | None = None) -> list[Path]:
        """The logs that are there: of all ranks or of one. Older versions had them all in one folder."""
        if rank is None:
            return sorted((*self.logs.glob("rank-*.log"), *self.logs.glob("ranks-*/rank-*.log")))
        return [path for path in {self.logs / f"rank-{rank}.log": 0, self.rank_log(rank): 0} if path.exists()]

    def samples(self, rank: int) -> Path:
        """Which samples each step of a rank consumed."""
        return self.path / f"samples-rank{rank}.jsonl"

    def rank_failure(self, attempt: int, rank: int) -> Path:
        """What a failed rank says of its exception."""
        return self.failures / f"attempt-{attempt}-rank-{rank}.json"

    # Events.
    def record(self, event: str, **fields: Any) -> None:
        """Append an event. It must be one of `trainer.run.events.EVENTS`, with that kind's fields.

        One that cannot be written is printed, and written with the next one, if that can be.
        """
        kind = EVENTS[event]
        assert kind.more or fields.keys() <= set(kind.fields), (event, fields)
        line = event_files.make_event(self.events, self.old_events, event, fields)
        file = _event_file(event_files.own_file(self.events))
        file.write(line)
        if file.waiting:
            warn(f"not recorded yet: {line}")

    def read_events(self) -> list[Event]:
        """All events, the oldest first."""
        return event_files.read(self.events, self.old_events)

    def event_files(self, *parts: str) -> list[Path]:
        """The files of events, of all writers or of some; new ones may come."""
        return event_files.files(self.events, self.old_events, parts)

    def read_main_events(self) -> list[Event]:
        """Those of node 0 and of the submitting side, which tell how the run goes: few files, however many nodes."""
        return event_files.read(self.events, self.old_events, event_files.MAIN)

    # What can be told from the files alone.
    def exists(self) -> bool:
        """Whether this is the folder of a run, and not that of a job file which is called job.yaml."""
        return self.job.is_file() and self.has_events()

    def has_events(self) -> bool:
        """Whether this is the folder of a run or of a sweep."""
        return self.events.exists() or self.old_events.exists()

    def steps_committed(self) -> int:
        """The step of the newest checkpoint, -1 before the first."""
        return max(map(step_of, committed(self.checkpoints)), default=-1)

    def state_bytes(self) -> int:
        """The size of the newest checkpoint, 0 before the first; of a damaged one, too."""
        manifest = read_json(self.checkpoints / f"step-{self.steps_committed():09d}" / "manifest.json") or {}
        with contextlib.suppress(*NOT_OURS):
            return sum(int(facts.get("bytes", 0)) for facts in manifest.get("files", {}).values())
        return 0

    # Making and finding runs.
    def make(self) -> None:
        """Make the folder and that of its logs, if they are not there.

        A default ACL of the folder around it, as shares of groups have, would let others write, whatever the umask is:
        nothing that is made in the folder gets it.
        """
        self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # there is none, or it is not ours to remove
            os.removexattr(self.path, "system.posix_acl_default")
        self.logs.mkdir(mode=0o755, exist_ok=True)

    @classmethod
    def create(cls, runs: str, name: str, job_text: str, job_folder: Path | None = None) -> RunFolder:
        """Make a new run folder `<runs>/<name>-<id>`. No two calls ever get the same.

        `job_text` is the merged job as YAML. User code may lie in `job_folder`, beside the job file.
        Raises JobError: the folder `runs` cannot be written, or its file system cannot do what a run needs.
        """
        root = Path(runs).resolve()
        try:
            make_ignored(root)
            check_abilities(root)
            run = cls(_make_unique(root, name))
            run.make()
            for folder in (run.plan, run.events):
                folder.mkdir()
            here = os.getcwd()
            places = {"working_directory": here, "job_folder": str(job_folder or here), "run": str(run)}
            write_json(run.source, places)
            write_text(run.job, job_text)
        except OSError as error:
            problem = f"cannot be written: {error}"
            raise JobError("runs", runs, problem, "Give a writable folder: runs=...") from None
        run.record("submitted", by=os.environ.get("USER", str(os.getuid())))
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of a run that exists; `path` may also name its job.yaml. Raises JobError: no such run."""
        given = Path(path)
        run = cls((given.parent if given.name == JOB else given).resolve())
        if not run.job.is_file():
            raise JobError("RUN", str(path), "is not a run folder", "`muster list` shows the runs of a folder")
        return run

    @classmethod
    def list_all(cls, root: Path, named: str = "*") -> list[RunFolder]:
        """The runs below `root` whose names fit the pattern, the oldest first."""
        runs = [cls(path.parent) for path in root.glob(f"{named}/{JOB}")]
        return sorted((run for run in runs if run.exists()), key=lambda run: run.job.stat().st_mtime)


@functools.cache
def _event_file(path: Path) -> LineFile:
    return LineFile(path, retry_s=0, stays_open=False)


def make_ignored(folder: Path) -> None:
    """Make a folder that no repository, and no snapshot of its code, takes along."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")


def _make_unique(root: Path, name: str) -> Path:
    while True:
        path = root / f"{name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o755)
            return path


def committed(checkpoints: Path) -> list[Path]:
    """The folders of committed checkpoints, the newest first; a link to one counts, a file of such a name does not."""
    found = (path for path in checkpoints.glob("step-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Steps done when a checkpoint was saved, by the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def last_event(events: Sequence[Event], *names: str) -> Event | None:
    """The newest event with one of the names."""
    return next((event for event in reversed(events) if event["event"] in names), None)


def find_job(path: Path) -> Path:
    """The job file that a path means, of a sweep that of this task. Raises JobError: outside an array of its size."""
    sweep = read_json(RunFolder(path).sweep) if path.is_dir() else None
    if sweep is None:
        return path
    runs, task = sweep["runs"], array_task()
    if task is None or not task.isdigit() or int(task) >= len(runs):
        problem = f"does not choose one of the {len(runs)} runs of {path}"
        raise JobError(SLURM_ARRAY_TASK_ID, task, problem, "Start a sweep through its array")
    return RunFolder(Path(runs[int(task)])).job


def run_of(job_file: Path) -> RunFolder | None:
    """The run that a job file belongs to: the platform's choice, or its own folder when that is a run's."""
    if (given := read_path(RUN)) is not None:
        return RunFolder(given)
    run = RunFolder((job_file if job_file.is_dir() else job_file.parent).resolve())
    return run if (job_file.is_dir() or job_file.name == JOB) and run.has_events() else None
