"""Run folders: where a run's files are. Never imports torch: both sides of a submission use it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trainer.config.job import Job
from trainer.errors import JobError
from trainer.records import read_json


def find_job(path: Path) -> Path:
    """The job file that a path means: of a task of an array, the one that its number chooses.

    Raises:
        JobError: outside an array, or more tasks than runs.
    """
    sweep = read_json(path / "sweep.json") if path.is_dir() else None
    if sweep is None:
        return path
    from trainer.wiring.node import array_task  # here: the other verbs do not need it

    number = array_task()
    if number is None or not number.isdigit() or int(number) >= len(sweep["runs"]):
        raise JobError(
            "SLURM_ARRAY_TASK_ID",
            number,
            f"chooses none of {len(sweep['runs'])} runs of {path}",
            "A sweep is started by its array",
        )
    return Path(sweep["runs"][int(number)]) / "job.yaml"


def import_paths(job_file: Path) -> list[str]:
    """Where user code is imported from: the working directory and the job file's folder.

    Of a run they are those that it was submitted from, or their places in its snapshot of the code.
    """
    run = job_file.resolve().parent
    source = read_json(run / "plan" / "source.json")
    if source is None:
        return [os.getcwd(), str(run)]
    working, folder = Path(source["working_directory"]), Path(source["job_folder"])
    code = run / "code"
    if not code.is_dir():
        return [str(working), str(folder)]
    inside = folder.is_relative_to(working)
    return [str(code), str(code / folder.relative_to(working) if inside else folder)]


def add_import_paths(job_file: Path | None) -> None:
    """Let user code be found and imported."""
    sys.path[:0] = [
        folder for folder in (import_paths(job_file) if job_file else [os.getcwd()]) if folder not in sys.path
    ]


def find_run(path: Path, job: Job, job_id: str, platform: str) -> Path:
    """The run folder of a job file: its own folder when that is a run, else one named after the scheduler's job."""
    given = os.environ.get("MUSTER_RUN")
    if given:
        return Path(given)
    if path.is_dir():
        path = path / "job.yaml"
    if path.name == "job.yaml" and (path.parent / "events.jsonl").exists():
        return path.parent.resolve()
    if platform == "alone":
        from trainer.launch.runs import make_run

        return make_run(job)
    return Path(job.runs).resolve() / f"{job.name}-{job_id}"


def is_shared() -> bool:
    """Whether all nodes see the run folder, and it outlives them; a platform without a shared volume says no."""
    return os.environ.get("MUSTER_RUN_SHARED") != "0"


def steps_committed(run: Path) -> int:
    """The step of the newest checkpoint, -1 before the first."""
    try:
        names = [name for name in os.listdir(run / "checkpoints") if name.startswith("step-")]
    except FileNotFoundError:
        return -1
    return max((int(name.removeprefix("step-")) for name in names), default=-1)


def open_run(path: str | Path) -> Path:
    """The folder of a run that exists.

    Raises:
        JobError: no such run.
    """
    run = Path(path)
    if run.name == "job.yaml":
        run = run.parent
    if not (run / "job.yaml").is_file():
        near = sorted(str(item.parent) for item in run.parent.glob(f"{run.name}*/job.yaml"))
        hint = f"Did you mean {near[-1]}?" if near else "`muster list` shows the runs of a folder"
        raise JobError("RUN", str(path), "is no run folder", hint)
    return run.resolve()
