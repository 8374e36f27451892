"""What is said while a run waits: why, since when, and that it goes on. The reasons come from the platforms."""

import contextlib
import time

from trainer.launch.platform import JobStatus, Phase
from trainer.run.descriptions import duration
from trainer.run.folder import RunFolder

REPEAT_S = 300.0
"""How often a reason that stays the same is said again."""


class Waiting:
    """The waits of one run, for whoever follows it."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.reason, self.said = "", 0.0

    def line(self, status: JobStatus) -> str:
        """What to say now: a new reason at once, the same one now and then; empty when there is nothing to say."""
        reason = status.reason if is_waiting(status) else ""
        again = time.monotonic() - self.said > REPEAT_S
        if reason == self.reason and not (reason and again):
            return ""
        self.reason, self.said = reason, time.monotonic()
        waits = "waiting" if status.phase == Phase.RUNNING else status.phase
        return f"{' '.join(filter(None, (waits, waited(self.run))))}: {reason}" if reason else ""


def is_waiting(status: JobStatus) -> bool:
    """Whether a run can do nothing but wait, or nobody knows what it does."""
    return status.phase in (Phase.PENDING, Phase.UNKNOWN) or status.waits


def waited(run: RunFolder) -> str:
    """For how long nothing was heard of a run, once that is a minute or more: `for 5 min`."""
    newest = 0.0
    for path in (run.handle, *run.event_files(), *run.logs.glob("*.*")):
        with contextlib.suppress(OSError):
            newest = max(newest, path.stat().st_mtime)
    passed = time.time() - newest if newest else 0.0
    return f"for {duration(passed)}" if passed >= 60 else ""
