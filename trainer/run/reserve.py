"""Room for the last word on a run: a file that is removed when it must be written, because the disk may be full."""

import contextlib
import os

from trainer.run.folder import RunFolder

SIZE = 64 << 10


def keep_room(run: RunFolder) -> None:
    """Take the room while there is some. Random bytes: no file system stores them in less."""
    with contextlib.suppress(OSError):
        if not run.reserve.exists():
            run.reserve.write_bytes(os.urandom(SIZE))


def make_room(run: RunFolder) -> None:
    """Give it back to whoever writes the last word, now."""
    with contextlib.suppress(OSError):
        run.reserve.unlink()
