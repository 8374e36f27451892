"""Exit codes and the errors that carry them: the contract of every process that Muster starts."""

import copyreg
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

DONE = 0  # the run reached its end
FAILED = 1  # anything unexpected: retried within the restart budget
WRONG_JOB = 64  # the job file or the command is wrong (EX_USAGE of sysexits.h): never retried
STOPPED = 75  # stopped on request with a checkpoint saved (EX_TEMPFAIL of sysexits.h): to be requeued


HIDDEN: dict[str, str] = {}
"""What the job of this process takes from environment variables, which may be secrets, and how the job writes it."""


def hide(text: str) -> str:
    """The text, with what comes from a variable as the job writes it: `${oc.env:NAME}`."""
    for value in sorted(HIDDEN, key=len, reverse=True):
        text = text.replace(value, HIDDEN[value])
    return text


class JobError(ValueError):
    """The user's input is wrong. The message names the key, the value and the remedy; exit code 64."""

    code = WRONG_JOB

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        shown, problem, remedy = hide(repr(value)), hide(problem), hide(remedy)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        super().__init__(f"{key}={shown}: {problem}. {remedy}")
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy

    def __reduce__(self) -> Any:
        """It may come from another process, with a value that cannot travel."""
        return copyreg.__newobj__, (type(self), str(self)), {**vars(self), "value": None}  # type: ignore[attr-defined]


class MaybeAccepted(JobError):
    """The platform failed while it took the job, and may have taken it."""


class Refused(JobError):
    """The platform did not take the job, and has not taken it in an earlier try either."""


class Cut(MaybeAccepted):
    """The connection to whoever takes the job was cut: the same command completes the submission."""

    code = FAILED


def did_you_mean(word: object, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """A remedy that names the nearest of the `known` words; `otherwise` where none is near."""
    near = difflib.get_close_matches(str(word), list(known), 1, cutoff)
    return f"Did you mean {near[0]}?" if near else otherwise


def wrong_choice(key: str, value: object, known: Sequence[str], otherwise: str = "Choose one of them") -> JobError:
    """The error for a value that is not one of the `known` ones."""
    return JobError(key, value, "must be one of " + ", ".join(known), did_you_mean(value, known, otherwise))


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Stopped(SystemExit):
    """Every rank agreed to stop and the checkpoint is committed; exit code 75."""

    def __init__(self) -> None:
        super().__init__(STOPPED)
