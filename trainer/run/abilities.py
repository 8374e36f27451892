"""What a run folder's file system must be able to do: asked before anything is started, not after an epoch.

And what it may fail to do for a moment, which is waited for.
"""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trainer.errors import JobError
from trainer.records import append_line, write_json
from trainer.signals import FLAG

T = TypeVar("T")

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EINTR, errno.EMFILE, errno.ENFILE)
"""Errors that say nothing about what a file system can do."""
PATIENCE_S, RETRY_S = 30.0, 0.2
"""How long such an error is waited for, and between two tries."""


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


def patiently(act: Callable[[], T], tell: Callable[[str], None] = lambda text: None) -> T:
    """What `act` returns. It is tried again while the disk is full, or its server restarts; `tell` says so, once.

    Raises OSError: another error, or it stays for `PATIENCE_S`, or until somebody asks this process to stop.
    """
    end, told = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            return act()
        except OSError as error:
            if error.errno not in PASSING or time.monotonic() > end or FLAG.requested:
                raise
            if not told:
                tell(f"the run folder cannot be written: {error}. Trying again for {PATIENCE_S:.0f} s")
            told = True
            time.sleep(RETRY_S)
