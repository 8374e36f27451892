"""What a stale attempt would write beside checkpoints, refused: metrics, samples, the result."""

import contextlib
import os
import time

from trainer.run.attempts import check_current
from trainer.run.folder import RunFolder

LOOK_S = 10.0
"""Between two looks into the folder of attempts. In between its time of change tells of a new one."""


class Fence:
    """Before one attempt's writes: two microseconds each, on a disk of this machine."""

    def __init__(self, run: RunFolder, attempt: int) -> None:
        self.run, self.attempt, self.folder = run, attempt, str(run.attempts)
        self.seen, self.looked = -1, 0.0

    def check(self) -> None:
        """Raises StaleAttempt: a later attempt owns the run. Where nobody can tell now, nothing is refused."""
        with contextlib.suppress(OSError):  # no agent counts attempts, or their server does not answer
            changed, now = os.stat(self.folder).st_mtime_ns, time.monotonic()
            if changed != self.seen or now > self.looked + LOOK_S:  # two changes may have the same time
                check_current(self.run, self.attempt)
                self.seen, self.looked = changed, now
