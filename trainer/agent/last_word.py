"""The last word of an agent that ends badly: said first, where nothing can go wrong, and only then written.

It goes to the agent's log, on Kubernetes to the termination message, and into the run folder, which `muster run` and
`muster status` read and whose disk may be full.
"""

import contextlib
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.agent.failure import KINDS, Failure, classify
from trainer.errors import FAILED, STOPPED, WRONG_JOB, JobError, hide
from trainer.records import tell_platform, write_json
from trainer.run.folder import RunFolder, find_job, run_of
from trainer.run.reserve import make_room


def judge(error: Exception) -> tuple[int, str]:
    """The exit code that an exception of an agent means, and the reason in one line.

    What nobody expected is named with host and place, and its traceback goes to the agent's log.
    """
    if isinstance(error, JobError):
        return WRONG_JOB, str(error)
    with contextlib.suppress(OSError):
        traceback.print_exc()
    text = " ".join(hide(f"{type(error).__name__}: {error}").split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    kind = classify(FAILED, type(error).__name__, str(error), "", False) if isinstance(error, OSError) else ""
    known = kind in KINDS and kind != "user code"
    label, remedy = (f" [{kind}]", f". {KINDS[kind][0]}") if known else ("", "")
    return FAILED, (
        f"the agent on {socket.gethostname()} failed{label}: {text[:500]}{where}{remedy}. Its log has the traceback"
    )


def leave(
    run: RunFolder | None, code: int, reason: str, node: int | None = None, failures: Sequence[Failure] = ()
) -> None:
    """Say how the part of an agent ended, then record it; `run` None: there is no run folder yet.

    `failures`: the first one of each attempt; node 0 knows them.
    """
    if node is not None:
        say(f"{'STOPPED' if code == STOPPED else 'FAILED'} (exit {code}): {reason}")
    tell_platform(reason)
    if run is None:
        return
    make_room(run)
    if node == 0 and code != STOPPED:
        try:
            write_json(run.failure, {"reason": reason, "code": code, "failures": [asdict(each) for each in failures]})
        except OSError as error:
            say(f"{run.failure} could not be written: {error}")
    who = {} if node is None else {"node": node}
    if run.path.is_dir():
        run.record("ended", **who, code=code, reason=reason)


def leave_for(job_file: str, code: int, reason: str) -> None:
    """As `leave`, for an agent that ends before it has opened its run."""
    run = None
    with contextlib.suppress(OSError, JobError):
        run = run_of(find_job(Path(job_file)))
    leave(run, code, reason)


def say(text: str) -> None:
    """A line in this node's log."""
    with contextlib.suppress(OSError):
        print(f"[muster] {text}", file=sys.stderr, flush=True)
