"""GPU leases of local jobs: a locked file per device, released by the kernel when its holders are gone."""

import fcntl
import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from trainer.errors import JobError
from trainer.run.ownership import user_name
from trainer.signals import start_of

FOLDER = Path("/tmp/muster-gpus")
"""Shared by all users of a machine."""
LOCKS = Path("/proc/locks")


@dataclass
class Lease:
    """Devices that this process, and those that inherit its files, hold."""

    devices: list[str]
    handles: list[int] = field(default_factory=list)

    def release(self) -> None:
        while self.handles:
            os.close(self.handles.pop())


def lock_folder(visible: Sequence[str], shared: Path = FOLDER) -> tuple[Path, str]:
    """Where the locks are, and what is wrong if they are not those that all users share.

    Anybody may make the shared folder, and so may make it useless: jobs of one user still get different devices then.
    Raises JobError: that is not possible either.
    """
    try:
        _try_all(visible, shared)
        return shared, ""
    except OSError as error:
        own = shared.with_name(f"{shared.name}-{os.geteuid()}")
        problem = f"{shared} cannot be used for locks ({error.strerror}); jobs of other users may get the same GPUs"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        facts = own.lstat()
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise PermissionError(0, "others may write there")
        _try_all(visible, own)
    except OSError as error:
        remedy = f"Remove {own}, or let an administrator remove {shared}"
        both = f"{own} cannot be used for locks either ({error.strerror}); {problem}"
        raise JobError("devices", ",".join(visible), both, remedy) from None
    return own, problem


def _try_all(devices: Sequence[str], folder: Path) -> None:
    for device in devices:
        os.close(_open_lock(folder / f"{device}.lock"))


def try_lease(wanted: list[str] | int, visible: list[str], folder: Path = FOLDER) -> Lease | None:
    """Lock the devices, all or none; None while too few are free."""
    count, devices = (wanted, visible) if isinstance(wanted, int) else (len(wanted), wanted)
    lease = Lease([])
    for device in devices:
        if len(lease.devices) == count:
            break
        lease.handles.append(_open_lock(folder / f"{device}.lock"))
        if try_lock(lease.handles[-1]) is False:
            os.close(lease.handles.pop())
        else:
            lease.devices.append(device)
    if len(lease.devices) == count:
        return lease
    lease.release()
    return None


def holders(devices: Sequence[str], folder: Path) -> str:
    """Who holds the devices, such as `0: process 17 of alice, which began Nov 28 10:31`, as far as the kernel says."""
    said = []
    for device in devices:
        with suppress(OSError, LookupError, ValueError, StopIteration):
            facts = (folder / f"{device}.lock").lstat()
            file = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
            lines = (line.split() for line in LOCKS.read_text().splitlines())
            pid = int(next(words[4] for words in lines if words[1:3] == ["FLOCK", "ADVISORY"] and words[5] == file))
            user, ticks = Path(f"/proc/{pid}").stat().st_uid, int(start_of(pid))
            age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
            since = time.strftime("%b %d %H:%M", time.localtime(time.time() - age_s))
            said.append(f"{device}: process {pid} of {user_name(user)}, which began {since}")
    return "; ".join(said)


def try_lock(handle: int) -> bool | None:
    """Lock an open file; False when somebody else holds it, None on a file system without locks (some of Lustre, NFS).

    Without them, nobody can be kept away: two runs of one folder are still told apart by their attempts.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _open_lock(path: Path) -> int:
    """Open a file that every user may lock; whoever comes first makes it. Raises OSError: something else is there.

    Read-only is enough for flock(2). An existing file is opened without O_CREAT, which the kernel refuses for files of
    others in folders like /tmp (fs.protected_regular, proc(5)). A pipe must not let us wait, nor a link lead us away.
    """
    if path.parent.is_symlink():
        raise NotADirectoryError(0, "it is a link")
    mask = os.umask(0)  # the next user's access must not depend on the first one's mask
    try:
        path.parent.mkdir(mode=0o1777, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o444))
    finally:
        os.umask(mask)
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(0, f"{path.name} is no file")
    return handle
