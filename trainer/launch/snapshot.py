"""The code of a run, copied when it is submitted: editing while the job waits in a queue changes nothing."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from trainer.errors import JobError
from trainer.records import write_json

LIMIT_MB = 100
"""Larger trees hold data, which belongs elsewhere."""


def take_snapshot(source: Path, run: Path) -> Path:
    """Copy the tracked and unignored files of `source` to `<run>/code`, read-only, with their hash recorded.

    Without git, the Python and YAML files are taken.

    Raises:
        JobError: more than `LIMIT_MB`.
    """
    target = run / "code"
    if target.exists():  # a run that is submitted again keeps the code that it began with
        return target
    files = [name for name in _files(source) if (source / name).is_file()]
    size = sum((source / name).stat().st_size for name in files)
    if size > LIMIT_MB * 2**20:
        largest = max(files, key=lambda name: (source / name).stat().st_size)
        raise JobError(
            "code",
            str(source),
            f"is {size >> 20} MiB, more than {LIMIT_MB}; the largest file is {largest}",
            "Add data to .gitignore, so that it is not copied",
        )
    digest = hashlib.sha256()
    for name in files:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)
        copy.chmod(0o555 if (source / name).stat().st_mode & 0o100 else 0o444)
        digest.update(name.encode() + b"\0" + hashlib.sha256(copy.read_bytes()).digest())
    target.mkdir(exist_ok=True)
    write_json(run / "plan" / "code.json", {"sha256": digest.hexdigest(), "files": len(files), "bytes": size})
    return target


def _files(source: Path) -> list[str]:
    command = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        output = subprocess.run(command, capture_output=True, check=True).stdout
        return sorted(set(output.decode().split("\0")) - {""})
    except (OSError, subprocess.CalledProcessError):
        found = [path for pattern in ("*.py", "*.yaml") for path in source.rglob(pattern)]
        names = [path.relative_to(source) for path in found]
        return sorted(str(name) for name in names if not any(part[0] == "." or part == "runs" for part in name.parts))
