"""Runs whose folder is no longer where it was made: moved, renamed, or copied, alone or with the project around it."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder


def copied_from(run: RunFolder, handle: dict[str, Any]) -> RunFolder | None:
    """The run that this one is a copy of, with its handle: what the platform knows by it goes on there."""
    there = RunFolder(Path(handle.get("run", run.path)))
    with suppress(OSError):
        return None if there.path.samefile(run.path) or not there.handle.exists() else there
    return None  # it was moved, or has another path on another machine


def find_code(run: RunFolder) -> None:
    """Let a run find the user's code again, and say where; one with a snapshot of it has it along."""
    source = read_json(run.source)
    if source is None or run.code.is_dir():
        return
    before, working = Path(source.get("run", run.path)), Path(source["working_directory"])
    project = _project(run.path, before, working)
    if project != working:
        old = Path(source["job_folder"])
        folder = project / old.relative_to(working) if old.is_relative_to(working) else old
        source |= {"working_directory": str(project), "job_folder": str(folder if folder.is_dir() else project)}
    if before != run.path or project != working:
        print(f"note: this run was made in {before}; it now uses the code in {project}", file=sys.stderr)
        with suppress(OSError):  # of another user: who may only look needs no record
            write_json(run.source, source | {"run": str(run.path)})


def _project(now: Path, before: Path, working: Path) -> Path:
    """Where the working directory of a run is, which was made as `before` and is at `now`."""
    here = Path.cwd()
    if before.is_relative_to(working):
        inside = before.relative_to(working).parts
        beside = now.parents[len(inside) - 1]
        if now.parts[-len(inside) :] == inside and (here.is_relative_to(beside) or not working.is_dir()):
            return beside
    return working if working.is_dir() else here
