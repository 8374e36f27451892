"""The last word of an agent that ends badly, left wherever somebody looks for it.

That is the run folder, which `muster run` and `muster status` read, and on Kubernetes the termination message.
"""

import contextlib
import socket
import traceback
from pathlib import Path

from trainer.errors import FAILED, WRONG_JOB, JobError, hide
from trainer.records import tell_platform
from trainer.run.folder import RunFolder, find_job, run_of


def judge(error: Exception) -> tuple[int, str]:
    """The exit code that an exception of an agent means, and the reason in one line.

    What nobody expected is named with host and place, and its traceback goes to the agent's log.
    """
    if isinstance(error, JobError):
        return WRONG_JOB, str(error)
    traceback.print_exc()
    text = " ".join(hide(f"{type(error).__name__}: {error}").split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return FAILED, f"the agent on {socket.gethostname()} failed: {text[:500]}{where}. Its log has the traceback"


def leave(run: RunFolder | None, code: int, reason: str, node: int | None = None) -> None:
    """Record how the part of an agent ended, and tell the platform; `run` None: there is no run folder yet."""
    who = {} if node is None else {"node": node}
    if run is not None:
        with contextlib.suppress(OSError):  # it may be what failed
            run.record("ended", **who, code=code, reason=reason)
    tell_platform(reason)


def leave_for(job_file: str, code: int, reason: str) -> None:
    """As `leave`, for an agent that ends before it has opened its run."""
    run = None
    with contextlib.suppress(OSError, JobError):
        run = run_of(find_job(Path(job_file)))
    leave(run, code, reason)
