"""GPU leases of local jobs: a locked file per device, released by the kernel when its holders are gone."""

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path("/tmp/muster-gpus")
"""Shared by all users of a machine."""


@dataclass
class Lease:
    """Devices that this process, and those that inherit its files, hold."""

    devices: list[str]
    handles: list[int] = field(default_factory=list)

    def release(self) -> None:
        while self.handles:
            os.close(self.handles.pop())


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
    """Open a file that every user may lock; whoever comes first makes it.

    Read-only is enough for flock(2). An existing file is opened without O_CREAT, which the kernel refuses for files of
    others in folders like /tmp (fs.protected_regular, proc(5)).
    """
    mask = os.umask(0)  # the next user's access must not depend on the first one's mask
    try:
        path.parent.mkdir(mode=0o1777, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o444))
    finally:
        os.umask(mask)
    return os.open(path, os.O_RDONLY)
