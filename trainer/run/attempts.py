"""Attempts: who owns a run. Each start of the ranks has a number; only the newest may write checkpoints.

A node that was declared dead may live on behind a cut network, with a disk that it shares with its successor.
"""

import contextlib
import os
from collections.abc import Callable

from trainer.run.folder import RunFolder


class StaleAttempt(RuntimeError):
    """A later attempt owns the run: this one must not write."""


def claim(run: RunFolder, attempt: int, launch: str = "") -> None:
    """Make `attempt` the owner of the run, for a launch that knows it again by `claimed_by`.

    Raises StaleAttempt: it, or a later one, was claimed already. Raises OSError: nobody knows whether it is now.
    """
    run.attempts.mkdir(parents=True, exist_ok=True)
    check_current(run, attempt)
    try:
        handle = os.open(run.attempts / f"{attempt:06d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:  # two launches of the run claim at the same time: one of them has it
        raise StaleAttempt(f"attempt {attempt} of {run.name} is somebody else's") from None
    with contextlib.suppress(OSError):  # it is there for all to see; tried again, it would be somebody else's
        try:
            os.write(handle, launch.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
    with contextlib.suppress(OSError):  # likewise
        _sweep(run)


def claimed_by(run: RunFolder, attempt: int) -> str:
    """The launch that claimed an attempt; empty where it could not write that."""
    return (run.attempts / f"{attempt:06d}").read_bytes().decode(errors="replace")


def _sweep(run: RunFolder) -> None:
    """Remove what ranks of earlier attempts were writing when they were killed, which has no name of its own yet."""
    written = (run.failures / "attempt-*", run.evaluation, run.result)
    for path in (part for whole in written for part in whole.parent.glob(f".{whole.name}.*-*")):
        with contextlib.suppress(OSError):
            path.unlink()


def newest(run: RunFolder) -> int:
    """The number of the newest attempt, -1 before the first."""
    try:
        names = os.listdir(run.attempts)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def check_current(run: RunFolder, attempt: int, ours: Callable[[], int] | None = None) -> None:
    """Refuse to go on for a stale attempt. Raises StaleAttempt: a later attempt owns the run.

    `ours`: tells the newest attempt of the same agent, which is no other's. An agent says so before it claims one.
    """
    owner = newest(run)
    attempt = ours() if ours else attempt  # only now: it may have claimed one a moment before we looked
    if owner > attempt:
        raise StaleAttempt(f"attempt {attempt} of {run.name} was replaced by attempt {owner}: nothing was written")
