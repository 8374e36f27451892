"""How a rank begins and ends: bound to its agent's life, logging to its file, failing with a record.

What a rank is told through its environment is made in `trainer.agent.rank_environment`.
"""

import atexit
import contextlib
import faulthandler
import functools
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trainer.checkpoint.memory import ASK
from trainer.config.job import Job
from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB, JobError, Stopped
from trainer.records import write_json
from trainer.run.folder import RunFolder
from trainer.signals import restore_signals, set_parent_death_signal
from trainer.wiring.rank import rank_wiring

STACKS = signal.SIGQUIT
"""Makes a rank write the Python stacks of all its threads, even while it waits inside C code."""
FORK_SERVER = os.getpid()
"""The process that imported this module: in a rank the fork server, which it was forked from."""


def run_rank(environment: dict[str, str], job: Job, run: RunFolder, job_file: Path, threads: int) -> NoReturn:
    """The body of one rank process, which gets `environment`; 0, 75 or an error's code is its exit code."""
    set_parent_death_signal(FORK_SERVER, signal.SIGKILL)  # which itself goes with the agent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the fork server's timer
    os.setpgid(0, 0)  # the agent ends it with all that it started
    os.environ.update(environment)
    wiring = rank_wiring()
    with contextlib.suppress(OSError):  # a sandbox may refuse; `top` and `pgrep muster-rank` tell ranks by this name
        Path("/proc/self/comm").write_text(f"muster-rank-{wiring.rank}")
    _redirect(run.rank_log(wiring.rank))
    stacks = run.stacks(wiring.rank).open("a")
    faulthandler.register(STACKS, stacks, all_threads=True, chain=False)
    faulthandler.enable(sys.stderr)  # a crash in native code leaves a Python stack in the log
    on_failure = functools.partial(_record_failure, run.rank_failure(wiring.attempt, wiring.rank), wiring.rank)

    def work() -> int:
        import torch

        torch.set_num_threads(threads)
        if job.script:
            try:
                return run_script(job)
            finally:
                # Private names, because there are no public ones: an interpreter does this at its end, and a script
                # relies on it, but a process of multiprocessing runs no exit functions (before Python 3.14).
                threading._shutdown()  # type: ignore[attr-defined]
                atexit._run_exitfuncs()
        signal.pthread_sigmask(signal.SIG_BLOCK, {ASK})  # a thread waits for it
        from trainer.training.rank import train

        return train(job, run.path, job_file, on_failure)

    end_with(work, on_failure)


def end_with(work: Callable[[], int], on_failure: Callable[[BaseException], object]) -> NoReturn:
    """Do a rank's work and end this process, with the exit code that `work` returns or that its exception means."""
    try:
        code = work()
    except Stopped:
        code = STOPPED
    except BaseException as error:
        on_failure(error)
        code = exit_code(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: with torch's threads one end in some dozens aborts, with a broken process group it hangs


def exit_code(error: BaseException) -> int:
    """What a rank ends with after an exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) and error.code else FAILED
    return WRONG_JOB if isinstance(error, JobError) else FAILED


def _redirect(path: Path) -> None:
    """Send standard output and error, of native code too, to the end of the rank's log."""
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def run_script(job: Job) -> int:
    """Run the user's script as `python script.py` would; return 0 or 75. Raises JobError: no such file."""
    restore_signals()
    script = str(job.script)
    if not Path(script).is_file():
        raise JobError("script", script, f"no such file on {socket.gethostname()}", f"Working directory: {os.getcwd()}")
    sys.argv = [script, *map(str, job.script_args)]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit_:
        if exit_.code not in (None, DONE, STOPPED):
            raise
        return STOPPED if exit_.code == STOPPED else DONE
    return DONE


def print_error(error: BaseException) -> str:
    """Print an exception, and return its traceback; for an error in the job that is empty, its message is enough."""
    text = "" if isinstance(error, JobError) else "".join(traceback.format_exception(error))
    print(text or f"ERROR: {error}", file=sys.stderr, flush=True)
    return text


def _is_from_outside(error: BaseException) -> bool:
    """Whether the world raised it, such as a network: another time it may not. A path that is not there stays so."""
    lasting = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    return isinstance(error, OSError) and not isinstance(error, lasting)


def _record_failure(path: Path, rank: int, error: BaseException) -> None:
    """Leave a record of the first exception for the agent's diagnosis, and the traceback in the log."""
    if isinstance(error, Stopped) or path.exists():
        return
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    record = {
        "rank": rank, "host": socket.gethostname(), "time": time.time(), "code": exit_code(error),
        "exception": type(error).__name__, "message": str(error)[:4000], "traceback": print_error(error)[-8000:],
        "chain": [type(item).__name__ for item in chain], "from_outside": any(map(_is_from_outside, chain)),
    }  # fmt: skip
    with contextlib.suppress(OSError):  # the disk may be what failed; the exit code and the log are left
        path.parent.mkdir(exist_ok=True)
        write_json(path, record)
