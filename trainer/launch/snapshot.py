"""The code of a run, copied when it is submitted, so that edits made while the job waits in a queue change nothing."""

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from trainer.config.job import Job
from trainer.errors import JobError
from trainer.records import write_json
from trainer.run.folder import RunFolder

LIMIT_MB = 100
"""A larger tree contains data, which belongs elsewhere."""


def take_snapshot(source: Path, run: RunFolder) -> Path:
    """Copy the tracked and unignored files of `source` to the run folder, read-only, and record their hash.

    Without git, the Python and YAML files are copied. Raises JobError: they are larger than `LIMIT_MB`.
    """
    if run.code.exists():  # a run that is continued keeps the code that it began with
        return run.code
    sizes = {name: (source / name).stat().st_size for name in _files(source.resolve(), run)}
    size = sum(sizes.values())
    if size > LIMIT_MB * 2**20:
        problem = f"is {size >> 20} MiB, more than {LIMIT_MB}; the largest file is {max(sizes, key=sizes.__getitem__)}"
        raise JobError("code", str(source), problem, "Add data to .gitignore, so that it is not copied")
    digest = hashlib.sha256()
    for name in sizes:
        copy = run.code / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)
        copy.chmod(0o555 if (source / name).stat().st_mode & 0o100 else 0o444)
        digest.update(name.encode() + b"\0" + hashlib.sha256(copy.read_bytes()).digest())
    run.code.mkdir(exist_ok=True)
    write_json(run.plan / "code.json", {"sha256": digest.hexdigest(), "files": len(sizes), "bytes": size})
    return run.code


def check_files(job: Job, run: RunFolder, folder: Path, sees_machine: bool) -> None:
    """Refuse a script, or weights to start from, that the ranks would not find. Raises JobError: there is no such file.

    `folder`: where relative paths begin for them; `sees_machine`: whether they also see the rest of this machine.
    """
    weights = None if run.steps_committed() >= 0 else job.checkpoint.load  # a run that has begun loads its own
    for key, value in (("script", job.script), ("checkpoint.load", weights)):
        if value and (sees_machine or not os.path.isabs(value)) and not (folder / value).exists():
            ignored = "" if sees_machine else ", or remove it from .gitignore, so that it is copied there"
            raise JobError(key, value, f"is not in {folder}", f"Give its absolute path{ignored}")


def _files(source: Path, run: RunFolder) -> list[str]:
    """The names of the files to copy, without those of runs: each snapshot would hold all earlier ones."""

    @functools.cache
    def is_of_runs(folder: Path) -> bool:
        if folder == source:
            return False
        here = RunFolder(folder)
        is_run = here.events.exists() and (here.job.exists() or here.sweep.exists())
        return is_run or folder == run.path.parent or is_of_runs(folder.parent)

    argv = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        output = subprocess.run(argv, capture_output=True, check=True).stdout
        names = set(output.decode().split("\0")) - {""}
    except (OSError, subprocess.CalledProcessError):
        paths = [path.relative_to(source) for pattern in ("*.py", "*.yaml") for path in source.rglob(pattern)]
        names = {str(path) for path in paths if not any(part[0] == "." for part in path.parts)}
    return sorted(name for name in names if (source / name).is_file() and not is_of_runs((source / name).parent))
