"""How a forked rank begins and ends: bound to its agent's life, logging to its file, failing with a record.

What a rank is told through its environment is made in `trainer.agent.rank_environment`.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
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


def run_rank(environment: dict[str, str], job: Job, run: RunFolder, job_file: Path, threads: int) -> NoReturn:
    """The body of one rank process, which gets `environment`; 0, 75 or an error's code is its exit code."""
    bind_to_fork_server()
    os.setpgid(0, 0)  # the agent ends it with all that it started
    os.environ.update(environment)
    wiring = rank_wiring()
    rank, attempt = wiring.rank, wiring.attempt
    _name_process(rank)
    _redirect(run.rank_log(rank))
    stacks = run.stacks(rank).open("a")
    faulthandler.register(STACKS, stacks, all_threads=True, chain=False)
    faulthandler.enable(sys.stderr)  # a crash in native code leaves a Python stack in the log
    recorded: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        if not recorded and not isinstance(error, Stopped):
            recorded.append(error)
            _record_failure(run, attempt, rank, error)

    try:
        import torch

        torch.set_num_threads(threads)
        if job.script:
            code = _run_script(job)
        else:
            signal.pthread_sigmask(signal.SIG_BLOCK, {ASK})  # a thread waits for it
            from trainer.training.rank import train

            code = train(job, run.path, job_file, on_failure)
    except Stopped:
        code = STOPPED
    except BaseException as error:
        on_failure(error)
        code = exit_code(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: finalizers, of a broken process group above all, can hang


def _name_process(rank: int) -> None:
    """Let `top` and `pgrep muster-rank` tell ranks from other processes: all have the fork server's command line."""
    with contextlib.suppress(OSError):  # a sandbox may refuse
        Path("/proc/self/comm").write_text(f"muster-rank-{rank}")


def exit_code(error: BaseException) -> int:
    """What a rank ends with after an exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) and error.code else FAILED
    return WRONG_JOB if isinstance(error, JobError) else FAILED


def bind_to_fork_server() -> None:
    """Let this process be killed when the fork server is gone, which itself goes with the agent."""
    from trainer.agent import fork_server_preload  # here: only a fork server may import it

    set_parent_death_signal(fork_server_preload.PID, signal.SIGKILL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the fork server's timer


def _redirect(path: Path) -> None:
    """Send standard output and error, of native code too, to the end of the rank's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _run_script(job: Job) -> int:
    """Run the user's script as `python script.py` would, with signals as it expects them; return its exit code."""
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
    finally:
        # Private names, because there are no public ones: an interpreter does this at its end, and a script relies on
        # it, but a process of multiprocessing runs no exit functions (before Python 3.14).
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    return DONE


def _record_failure(run: RunFolder, attempt: int, rank: int, error: BaseException) -> None:
    """Leave a record for the agent's diagnosis, and the traceback in the log."""
    text = "" if isinstance(error, JobError) else "".join(traceback.format_exception(error))
    print(text or f"ERROR: {error}", file=sys.stderr, flush=True)
    record = {
        "rank": rank, "host": socket.gethostname(), "time": time.time(), "code": exit_code(error),
        "exception": type(error).__name__, "message": str(error)[:4000], "traceback": text[-8000:],
        "chain": [type(item).__name__ for item in _chain(error)],
    }  # fmt: skip
    run.failures.mkdir(exist_ok=True)
    write_json(run.rank_failure(attempt, rank), record)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
