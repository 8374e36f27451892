"""Making and listing run folders: the only state of a submission."""

from __future__ import annotations

import os
import secrets
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.job import Job
from trainer.errors import JobError
from trainer.records import record_event, write_json
from trainer.run.folder import steps_committed

if TYPE_CHECKING:  # not for the verbs that only read
    from omegaconf import DictConfig


def make_run(job: Job, config: DictConfig | None = None, job_folder: Path | None = None) -> Path:
    """Make a new run folder `<runs>/<name>-<id>` with the job in it; no two calls ever get the same.

    `job_folder`: where the job file lies; user code may lie beside it.

    Raises:
        JobError: the runs folder cannot be written.
    """
    from omegaconf import OmegaConf

    from trainer.config.load import save_job

    root = Path(job.runs).resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            run = root / f"{job.name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            try:
                run.mkdir(mode=0o755)
                break
            except FileExistsError:
                continue
        (run / "logs").mkdir()
        (run / "plan").mkdir()
        folders = {"working_directory": os.getcwd(), "job_folder": str(job_folder or os.getcwd())}
        write_json(run / "plan" / "source.json", folders)
        save_job(config if config is not None else OmegaConf.structured(job), run / "job.yaml")
    except OSError as error:
        raise JobError("runs", job.runs, f"cannot be written: {error}", "Give a writable folder: runs=...") from None
    record_event(run, "submitted", by=os.environ.get("USER", str(os.getuid())))
    return run


def make_run_by_hand(run: Path, config: DictConfig, copied: bool) -> list[str]:
    """Lines of shell that make the folder of a run that nobody submitted; `copied`: whether its code lies in it."""
    from omegaconf import OmegaConf

    if (run / "plan" / "source.json").exists():
        return []
    code = [f"mkdir -p {shlex.quote(str(run / 'code'))}  # where modules of your own are found: copy them there"]
    return [
        f"mkdir -p {shlex.quote(str(run / 'logs'))}",
        f"touch {shlex.quote(str(run / 'events.jsonl'))}  # tells that it is a run's: nobody makes another",
        *(code if copied else []),
        f"cat >{shlex.quote(str(run / 'job.yaml'))} <<'END_OF_JOB'",
        *OmegaConf.to_yaml(config, resolve=False).splitlines(),
        "END_OF_JOB",
    ]


def check_files(job: Job, run: Path, folder: Path, everywhere: bool) -> None:
    """Refuse a script, or weights to start from, that the ranks would not find.

    `folder`: where relative paths begin for them; `everywhere`: whether they also see the rest of this machine.

    Raises:
        JobError: it is not there.
    """
    begun = steps_committed(run) >= 0  # then no other weights are loaded
    for key, value in (("script", job.script), ("checkpoint.load", None if begun else job.checkpoint.load)):
        if value and (everywhere or not os.path.isabs(value)) and not (folder / value).exists():
            ignored = "" if everywhere else ", or remove it from .gitignore, so that it is copied there"
            raise JobError(key, value, f"is not in {folder}", f"Give its absolute path{ignored}")


def list_runs(root: Path) -> list[Path]:
    """Run folders below `root`, the oldest first."""
    found = [path.parent for path in root.glob("*/job.yaml") if (path.parent / "events.jsonl").exists()]
    return sorted(found, key=lambda run: (run / "job.yaml").stat().st_mtime)


def last_event(events: list[dict[str, Any]], *names: str) -> dict[str, Any] | None:
    """The newest event with one of the names."""
    return next((event for event in reversed(events) if event["event"] in names), None)
