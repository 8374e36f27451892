"""Whose a run is: nobody acts on a folder that somebody else made or may write into, and nobody makes one like that."""

import os
import pwd
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from trainer.errors import JobError
from trainer.run.folder import Entry, RunFolder

OF_RANKS = ("failures", "metrics.jsonl", "profile", "tensorboard")
"""What ranks make, in whose processes user code may choose another umask; nothing is done because of it."""
NAMES = [entry.name for entry in vars(RunFolder).values() if isinstance(entry, Entry) and entry.name not in OF_RANKS]


class ForeignRun(JobError):
    """A run folder of somebody else: not even this error is written there."""


def forbid_group_writes() -> None:
    """Let nothing that this process, or a child of it, makes be writable by others than its user."""
    os.umask(os.umask(0o022) | 0o022)


def check_owner(run: RunFolder) -> None:
    """Refuse to act on what somebody else wrote, or may write: it would be done in this user's name. Raises ForeignRun.

    A run folder says which class is imported, and which job, process or container is stopped.
    """
    for path in _acted_upon(run):
        with suppress(OSError):  # it is not there, or a link to nothing
            facts = path.stat()
            if facts.st_uid != os.geteuid() and facts.st_uid != _owner_of_new_files(run):
                owner = user_name(facts.st_uid)
                problem = f"{path} belongs to {owner}, and you are {user_name(os.geteuid())}: nothing in it is believed"
                raise ForeignRun(
                    "RUN", str(run), problem, f"Act as {owner}, or submit the job file as a run of your own"
                )
            if facts.st_mode & 0o022:
                problem = f"others than you may write to {path}: nothing in it is believed"
                raise ForeignRun("RUN", str(run), problem, f"If you know what is in it: chmod -R go-w {run}")


def is_own(run: RunFolder) -> bool:
    """Whether `check_owner` lets this user act on it."""
    try:
        check_owner(run)
    except ForeignRun:
        return False
    return True


def _acted_upon(run: RunFolder) -> Iterator[Path]:
    """What decides what is done: the folder, what it is known to hold, the plan, and all of the code."""
    yield run.path
    yield from (run.path / name for name in NAMES)
    yield from run.plan.glob("*")
    with suppress(OSError):
        if not run.code.stat().st_mode & 0o077:  # as snapshots are: nobody else gets to what is in it
            return
    for folder, folders, files in os.walk(run.code):
        paths = (Path(folder, name) for name in (*folders, *files))
        yield from (path for path in paths if not path.is_symlink())  # what it leads to was never copied


def _owner_of_new_files(run: RunFolder) -> int | None:
    """Whose a file is that this process makes there: on some network file systems it is always the same user's."""
    with suppress(OSError), tempfile.TemporaryFile(dir=run.path) as file:
        return os.fstat(file.fileno()).st_uid
    return None


def user_name(user: int) -> str:
    """The login name of a user id, or words for one that has none."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
