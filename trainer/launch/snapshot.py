"""The code of a run, copied when it is submitted, so that edits made while the job waits in a queue change nothing."""

import functools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from trainer.config.job import Job
from trainer.config.user_code import MODULE, import_paths
from trainer.errors import JobError
from trainer.launch.elsewhere import take_modules
from trainer.launch.source_files import copy_files, list_files
from trainer.records import write_json
from trainer.run.folder import RunFolder
from trainer.run.tree_hash import tree_hash

LIMIT_MB = 100
"""A larger tree contains data, which belongs elsewhere."""


def take_snapshot(source: Path, run: RunFolder, job: Job | None = None) -> Path:
    """Copy the tracked and unignored files of `source` to the run folder, read-only, and record their hash.

    `job` says which more or fewer; what its code imports from elsewhere goes along, too.

    Nobody may do more with a copy than with its source; only this user gets into the folder of them at all. Links stay
    links. What is left out, such as secrets, is said. Raises JobError: it is larger than `LIMIT_MB`, or git refuses to
    list it.
    """
    if run.code.exists():  # a run that is continued keeps the code that it began with
        return run.code
    if run.code.is_symlink():
        problem = f"its code is that of its sweep, {os.readlink(run.code)}, which is not there"
        raise JobError("RUN", str(run), problem, "Keep the folder of the sweep beside its runs")
    source, job = source.resolve(), job or Job()
    wanted = job.snapshot
    names, notes = list_files(source, of_runs(source, run.path.parent), wanted.include, wanted.exclude)
    links = [name for name in names if (source / name).is_symlink()]
    sizes = {name: (source / name).stat().st_size for name in names if name not in links}
    size = sum(sizes.values())
    if size > LIMIT_MB * 2**20:
        problem = f"is {size >> 20} MiB, more than {LIMIT_MB}; the largest file is {max(sizes, key=sizes.__getitem__)}"
        raise JobError("code", str(source), problem, "Add data to .gitignore, so that it is not copied")
    pending = run.code.with_name(".code")
    shutil.rmtree(pending, ignore_errors=True)  # of a copy that was killed
    try:
        pending.mkdir(mode=0o700, parents=True)
        copy_files(source, pending, sizes)
        for name in links:
            notes += _link(source, pending, name)
        notes += take_modules(source, pending, job, import_paths(run.job, job.python_path))
        facts = {"sha256": tree_hash(pending), "files": len(sizes), "bytes": size, "left_out": notes}
        write_json(run.plan / "code.json", facts)
        pending.rename(run.code)  # whole: half of it would be taken for the code by the next try
    except BaseException:
        shutil.rmtree(pending, ignore_errors=True)
        raise
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return run.code


def _link(source: Path, code: Path, name: str) -> list[str]:
    """Link as `source` does, to the place in the snapshot; return a note if it leads out of that. Nothing is copied."""
    target = (source / name).resolve()
    link = code / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if target.is_relative_to(source) and (code / target.relative_to(source)).exists():
        link.symlink_to(os.path.relpath(code / target.relative_to(source), link.parent))
        return []
    link.symlink_to(target)
    return [f"{name} is a link to {target}, which is not copied: the nodes use what they find there when they start"]


def of_runs(source: Path, runs: Path) -> Callable[[Path], bool]:
    """Whether a folder below `source` is one of runs: each snapshot would hold all earlier ones."""

    @functools.cache
    def is_of_runs(folder: Path) -> bool:
        if folder == source:
            return False
        here = RunFolder(folder)
        is_run = here.has_events() and (here.job.exists() or here.sweep.exists())
        return is_run or folder == runs or is_of_runs(folder.parent)

    return is_of_runs


def check_files(job: Job, run: RunFolder, folder: Path, sees_machine: bool) -> None:
    """Refuse a script, folders to import from, or weights, that the ranks would not find. Raises JobError: one of them.

    `folder`: where relative paths begin for them; `sees_machine`: whether they also see the rest of this machine.
    """
    weights = None if run.steps_committed() >= 0 else job.checkpoint.load  # a run that has begun loads its own
    script = None if (job.script or "").startswith(MODULE) else job.script
    paths = [("script", script), ("checkpoint.load", weights), *(("python_path", path) for path in job.python_path)]
    for key, value in paths:
        if value and (sees_machine or not os.path.isabs(value)) and not (folder / value).exists():
            ignored = "" if sees_machine else ", or name it in snapshot.include, so that it is copied there"
            raise JobError(key, value, f"is not in {folder}", f"Give its absolute path{ignored}")
