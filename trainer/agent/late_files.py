"""Files that the submitting machine has written, and that this node sees late: NFS remembers what was not there."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from trainer.run.folder import JOB, RunFolder
from trainer.signals import FLAG
from trainer.wiring.variables import is_placed

LATE_S = 90.0
"""NFS asks its server again after acregmax and acdirmax, 60 s by default (nfs(5))."""


def await_job(path: Path) -> Path:
    """Wait for the job that a platform starts here, and go where its code is; return `path`.

    Slurm starts jobs in /tmp when it does not see their folder. What a person typed is not waited for.
    """
    if not (is_placed() and path.is_absolute()):
        return path
    end = time.monotonic() + LATE_S
    if not _sees(path):
        print(f"[muster] waiting for {path}, which is not here yet, up to {LATE_S:.0f} s", file=sys.stderr, flush=True)
    while not _sees(path) and time.monotonic() < end and FLAG.requested is None:
        time.sleep(0.5)
    code = RunFolder(path.parent if path.name == JOB else path).code
    if code.is_dir() and Path.cwd().resolve() == Path("/tmp"):
        os.chdir(code)
    return path


def _sees(path: Path) -> bool:
    """Whether a path is there; to list the folders above it makes NFS ask its server."""
    with suppress(OSError):
        if path.exists():
            return True
    for folder in path.parents[:3]:
        with suppress(OSError):
            os.listdir(folder)
    return False
