"""What a run folder's file system must be able to do: asked before anything is started, not after an epoch."""

import errno
import os
import secrets
import shutil
from pathlib import Path

from trainer.errors import JobError
from trainer.records import append_line, write_json

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EINTR, errno.EMFILE, errno.ENFILE)
"""Errors that say nothing about what a file system can do."""


def check_abilities(folder: Path) -> None:
    """Try what records and checkpoints do. Raises JobError: not there, as on some mounts of object stores.

    Raises OSError: something else is wrong.
    """
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(3)}"
    doing = "make a folder"
    try:
        probe.mkdir()
        for doing, act in (("append to a file", append_line), ("replace a file", write_json)):
            for _ in range(2):
                act(probe / doing, {})
        doing = "rename a folder"
        (probe / "before").mkdir()
        (probe / "before").rename(probe / "after")
    except OSError as error:
        if error.errno in PASSING:
            raise
        problem = f"one cannot {doing} there: {error.strerror}"
        remedy = "Give a folder on a file system that can, which this user may write to: runs=..."
        raise JobError("runs", str(folder), problem, remedy) from None
    finally:
        shutil.rmtree(probe, ignore_errors=True)
