"""Temporary folders: a short name for a long TMPDIR; the folder of one agent, with the heartbeats of its ranks.

What is left of ranks and agents that were killed is removed here, too.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import JobError

SHM = Path("/dev/shm")
SHORT = ("/tmp", "/var/tmp", "/dev/shm")
"""Where a short name for a long TMPDIR may be, in order."""
LONGEST = 107 - len("/torch-shm-dir-abcdef/manager.sock")
"""Bytes of a TMPDIR in which multiprocessing and torch can make sockets: their paths have 107 at most (unix(7))."""


def shorten_temporary_folder() -> None:
    """Give a long TMPDIR a short name, by a link, for this process and all that it starts.

    Raises JobError: no folder for temporary files can be written, or none holds the link.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        remedy = "Set TMPDIR to a folder that this user may write to"
        raise JobError("TMPDIR", os.environ.get("TMPDIR"), str(error), remedy) from None
    if len(os.fsencode(folder)) <= LONGEST:
        return
    for parent in SHORT:
        link = Path(parent, f"muster-{os.getuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}")
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                link.symlink_to(folder)
            if os.readlink(link) == folder and link.lstat().st_uid == os.getuid():
                os.environ["TMPDIR"] = tempfile.tempdir = str(link)
                return
    problem = f"has more than {LONGEST} characters: sockets cannot be made below it"
    raise JobError("TMPDIR", folder, problem, "Set TMPDIR to a folder with a shorter path")


def folder_prefix() -> str:
    """How the folders of agents begin that this process can look up in /proc; a process id follows.

    Hosts, containers and Slurm's job steps may share a folder for temporary files, but not their process ids.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    processes = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return f"muster-agent-{socket.gethostname()}-{boot}-{processes}-"


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A folder of this agent alone; removed at the end, as are those of agents that were killed."""
    for stale, alive in agent_folders():
        if not alive:
            shutil.rmtree(stale, ignore_errors=True)
    prefix = f"{folder_prefix()}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def agent_folders() -> list[tuple[Path, bool]]:
    """The folders of this user's agents among the processes seen here, and whether the agent lives."""
    found, prefix = [], folder_prefix()
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        with contextlib.suppress(OSError):  # another agent has just removed it
            if pid.isdecimal() and folder.stat().st_uid == os.getuid():
                found.append((folder, Path("/proc", pid).exists()))
    return found


def remove_leftovers(folder: Path) -> None:
    """Remove shared memory of loader workers, all of which were killed; each left a note in the agent's folder.

    torch makes a file for a batch and unlinks it a moment later; a worker that is killed in between leaves it. The
    file's name holds the process id of its maker.
    """
    notes = {note.name.removeprefix("worker-"): note for note in folder.glob("worker-*")}
    for file in SHM.glob("torch_*_*") if notes else ():
        if file.name.split("_")[1] in notes:
            with contextlib.suppress(OSError):  # of another user, whose container shares this memory
                file.unlink()
    for note in notes.values():
        note.unlink(missing_ok=True)
