"""How a rank begins and ends: bound to its agent's life, logging to its file, failing with a record.

What a rank is told through its environment is made in `trainer.agent.rank_environment`.
"""

import contextlib
import faulthandler
import functools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trainer.agent.exception_place import place_of
from trainer.agent.fork_server import REFUSED
from trainer.agent.script import end_script, run_script, watch_process_group
from trainer.config.given import JOBS
from trainer.config.job import Job
from trainer.errors import FAILED, HIDDEN, STOPPED, WRONG_JOB, JobError, Stopped, hide
from trainer.records import to_line, write_json
from trainer.reporting.heartbeat import Pulse
from trainer.run.abilities import patiently
from trainer.run.event_files import write_as
from trainer.run.folder import RunFolder
from trainer.run.output import never_fail
from trainer.signals import set_parent_death_signal
from trainer.wiring.rank import RankWiring, rank_wiring
from trainer.wiring.variables import HEARTBEAT, group_rank, read_path

OWN_FRAMES = (__file__, run_script.__code__.co_filename)
STACKS = signal.SIGQUIT
"""Makes a rank write the Python stacks of all its threads, even while it waits inside C code."""
STACKS_FILE = "stacks-"
"""How the files for them begin, in the agent's own folder; a local rank follows. The agent keeps what it asked for."""
RECORDED: list[BaseException] = []
"""The exception that this rank ends of, once that is recorded."""
FORK_SERVER = os.getpid()
"""The process that imported this module: in a rank the fork server, which it was forked from."""


def run_rank(
    environment: dict[str, str], job: Job, run: RunFolder, job_file: Path, threads: int, hidden: dict[str, str],
    roots: list[Path],
) -> NoReturn:  # fmt: skip
    """The body of one rank process, which gets `environment`; 0, 75 or an error's code is its exit code.

    `roots`: where the user's code may lie.
    """
    HIDDEN.update(hidden)
    set_parent_death_signal(FORK_SERVER, signal.SIGKILL)  # which itself goes with the agent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the fork server's timer
    os.setpgid(0, 0)  # the agent ends it with all that it started
    os.environ.update(environment)
    wiring = rank_wiring()
    write_as(group_rank())
    with contextlib.suppress(OSError):  # a sandbox may refuse; `top` and `pgrep muster-rank` tell ranks by this name
        Path("/proc/self/comm").write_text(f"muster-rank-{wiring.rank}")
    patiently(lambda: _redirect(run.rank_log(wiring.rank)))
    stacks = (read_path(HEARTBEAT) or run.job).with_name(f"{STACKS_FILE}{wiring.local_rank}").open("a")
    faulthandler.register(STACKS, stacks, all_threads=True, chain=False)
    faulthandler.enable(sys.stderr)  # a crash in native code leaves a Python stack in the log
    on_failure = functools.partial(record_failure, run.rank_failure(wiring.attempt, wiring.rank), wiring, roots)

    def work() -> int:
        if REFUSED:
            raise REFUSED[0]
        import torch

        torch.set_num_threads(threads)
        if job.script:
            JOBS.append(job)
            watch_process_group(run, wiring)
            return run_script(job, job_file)
        from trainer.training.rank import train

        return train(job, run.path, job_file, on_failure)

    end_with(work, on_failure, end_script if job.script else None)


def end_with(
    work: Callable[[], int], on_failure: Callable[[BaseException], object], last: Callable[[bool], None] | None = None
) -> NoReturn:
    """Do a rank's work and end this process, with the exit code that `work` returns or that its exception means.

    `last` is called in the end, with whether it ended without an exception.
    """
    failed = False
    try:
        code = work()
    except Stopped:
        code = STOPPED
    except BaseException as error:
        on_failure(error)
        code, failed = exit_code(error), True
    if last is not None:
        last(not failed)
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a script may have put something else in their place
            file.flush()
    os._exit(code)  # at once: with torch's threads one end in some dozens aborts, with a broken process group it hangs


def exit_code(error: BaseException) -> int:
    """What a rank ends with after an exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) and error.code else FAILED
    return WRONG_JOB if isinstance(error, JobError) else FAILED


def _redirect(path: Path) -> None:
    """Send standard output and error, of native code too, to the end of the rank's log."""
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    never_fail(by_line=False)


def print_error(error: BaseException) -> None:
    """Print an exception as Python would; of an error in the job, and of an exit with a message, the message alone."""
    if isinstance(error, (JobError, SystemExit)):
        print(f"ERROR: {error}" if isinstance(error, JobError) else error, file=sys.stderr, flush=True)
        return
    try:
        sys.excepthook(type(error), error, error.__traceback__)  # a script may have set its own
    except Exception:
        traceback.print_exception(error)


def _drop_own_frames(error: BaseException) -> None:
    """Let the traceback begin where the user's code, or the training, does."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in OWN_FRAMES:
        trace = trace.tb_next
    error.__traceback__ = trace or error.__traceback__


def _is_from_outside(error: BaseException) -> bool:
    """Whether the world raised it, such as a network: another time it may not. A path that is not there stays so."""
    lasting = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    return isinstance(error, OSError) and not isinstance(error, lasting)


def record_failure(path: Path, wiring: RankWiring, roots: list[Path], error: BaseException) -> None:
    """Leave a record of the first exception for the agent's diagnosis, and the traceback in the log.

    The agent gets it through memory, because it must not depend on a disk; the file is for people.
    """
    if isinstance(error, Stopped) or RECORDED:
        return
    RECORDED.append(error)
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    _drop_own_frames(error)
    text = "" if isinstance(error, (JobError, SystemExit)) else "".join(traceback.format_exception(error))
    place = place_of(f"{text}\n{error}", roots)  # before anything in the names of files is hidden
    record = {
        "rank": wiring.rank, "host": socket.gethostname(), "time": time.monotonic(), "code": exit_code(error),
        "exception": type(error).__name__, "message": hide(str(error))[:4000], "traceback": hide(text)[-8000:],
        "chain": [type(item).__name__ for item in chain], "from_outside": any(map(_is_from_outside, chain)),
        "place": hide(place),
    }  # fmt: skip
    with contextlib.suppress(OSError):
        Pulse(wiring.local_rank).leave_words(
            to_line(record | {"message": hide(str(error))[:most], "traceback": hide(text)[-most:]})
            for most in (2000, 400)
        )
    print_error(error)
    with contextlib.suppress(OSError):  # the disk may be what failed
        path.parent.mkdir(exist_ok=True)
        write_json(path, record)
