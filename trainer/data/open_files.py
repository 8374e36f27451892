"""Files that a dataset opened before its workers began: each worker gets a place of its own in them."""

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path


def take_own_places() -> None:
    """Open again, under the same number and at the same place, each file that this process only reads.

    Processes that were forked share the place in a file, and read each other's bytes: from a `ZipFile`, an HDF5 file or
    an index that was opened in the dataset's constructor. Called in a worker before it reads anything.
    """
    folder = Path("/proc/self/fd")
    for number in map(int, os.listdir(folder) if folder.exists() else ()):
        with suppress(OSError):  # such as the listing itself, or a file that may not be opened any more
            flags, kind = fcntl.fcntl(number, fcntl.F_GETFL), os.fstat(number).st_mode
            if flags & os.O_ACCMODE != os.O_RDONLY or not stat.S_ISREG(kind):
                continue
            own = os.open(folder / str(number), flags)
            os.lseek(own, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(own, number, os.get_inheritable(number))
            os.close(own)
