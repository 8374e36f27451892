"""Whose a run is: nobody acts on a folder that somebody else made or may write into, and nobody makes one like that."""

import os
import pwd
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from shlex import quote

from trainer.errors import JobError
from trainer.run.folder import Entry, RunFolder
from trainer.run.line_file import warn

OF_RANKS = ("failures", "metrics.jsonl", "profile", "tensorboard")
"""What ranks make, in whose processes user code may choose another umask; nothing is done because of it."""
NAMES = [entry.name for entry in vars(RunFolder).values() if isinstance(entry, Entry) and entry.name not in OF_RANKS]

MARKS_OF_CONTAINERS = ("/.dockerenv", "/run/.containerenv")


class ForeignRun(JobError):
    """A run folder of somebody else: not even this error is written there."""


def forbid_group_writes() -> None:
    """Let nothing that this process, or a child of it, makes be writable by others than its user."""
    os.umask(os.umask(0o022) | 0o022)


def check_owner(run: RunFolder) -> None:
    """Refuse to act on what somebody else wrote, or may write: it would be done in this user's name. Raises ForeignRun.

    A run folder says which class is imported, and which job, process or container is stopped.
    """
    new_file = cache(partial(_new_file, run))  # asked for when something looks wrong
    for path in _acted_upon(run):
        with suppress(OSError):  # it is not there, or a link to nothing
            facts = path.stat()
            if facts.st_uid != os.geteuid() and facts.st_uid != getattr(new_file(), "st_uid", None):
                raise _belongs_to(user_name(facts.st_uid), path, run)
            if facts.st_mode & 0o022 and not _same_for_all_files(facts, new_file()):
                problem = f"others than you may write to {path}: nothing in it is believed"
                raise ForeignRun("RUN", str(run), problem, f"If you know what is in it: {_command(path, run)}")


def note_open_modes(run: RunFolder) -> None:
    """Say so where files have the same mode whatever is asked for: who may write there, `check_owner` cannot see."""
    made = _new_file(run)
    if made is not None and made.st_mode & 0o022:
        warn(f"the file system of {run} lets others write to all files, whatever their modes: see who can reach it")


def foreign(run: RunFolder) -> str:
    """Why `check_owner` does not let this user act on it; empty where it does."""
    try:
        check_owner(run)
    except ForeignRun as error:
        return str(error)
    return ""


def _acted_upon(run: RunFolder) -> Iterator[Path]:
    """What decides what is done: the folder, what it is known to hold, the plan, and all of the code."""
    yield run.path
    yield from (run.path / name for name in NAMES)
    yield from run.plan.glob("*")
    if run.code.is_symlink():  # to the code of a sweep, in whose folder it could be replaced
        yield run.code.resolve().parent
    with suppress(OSError):
        if not run.code.stat().st_mode & 0o077:  # as snapshots are: nobody else gets to what is in it
            return
    for folder, folders, files in os.walk(run.code):
        paths = (Path(folder, name) for name in (*folders, *files))
        yield from (path for path in paths if not path.is_symlink())  # what it leads to was never copied


def _new_file(run: RunFolder) -> os.stat_result | None:
    """What a file is like that this process makes there, for itself alone; None where it may make none.

    On some network file systems it is always the same user's. On others, as on Windows' drives, its mode is fixed.
    """
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=run.path, prefix=".probe-") as file:
        with suppress(OSError):  # vfat refuses what it cannot keep
            os.chmod(file.name, 0o600)
        return os.stat(file.name)
    return None


def _same_for_all_files(facts: os.stat_result, made: os.stat_result | None) -> bool:
    """Whether the file system lets others write whatever the mode should be, so that it says nothing."""
    return made is not None and facts.st_dev == made.st_dev and bool(made.st_mode & 0o022)


def _belongs_to(owner: str, path: Path, run: RunFolder) -> ForeignRun:
    problem = f"{path} belongs to {owner}, and you are {user_name(os.geteuid())}: nothing in it is believed"
    remedy = f"Act as {owner}, or submit the job file as a run of your own"
    if any(map(os.path.exists, MARKS_OF_CONTAINERS)):
        remedy += ". In a container: start it with --user $(id -u), or, if its volume is yours, with "
        remedy += "--env=MUSTER_PLATFORM=docker"
    return ForeignRun("RUN", str(run), problem, remedy)


def _command(path: Path, run: RunFolder) -> str:
    """What takes the rights from others, also those that new files get from the folders around them."""
    folders = [quote(str(run))]
    around = []
    if run.code.is_symlink():
        target = run.code.resolve()
        folders.append(quote(str(target)))
        around = [f"chmod go-w {quote(str(target.parent))}"]
    inner = (each for each in (path, *path.parents) if each.is_relative_to(run.path))
    inherited = any(_has_default_acl(each) for each in inner)
    first = [f"setfacl -R -b {' '.join(folders)}"] if inherited else []
    return " && ".join([*first, f"chmod -R go-w {' '.join(folders)}", *around])


def _has_default_acl(folder: Path) -> bool:
    try:
        return "system.posix_acl_default" in os.listxattr(folder)
    except OSError:
        return False


def user_name(user: int) -> str:
    """The login name of a user id, or words for one that has none."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
