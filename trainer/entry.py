"""How a forked rank begins and ends: bound to its agent's life, logging to its file, failing with a record."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

from trainer.config import Job
from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB, JobError
from trainer.stop import SIGNALS

STACKS = signal.SIGQUIT
"""Makes a rank write the Python stacks of all its threads, even while it waits inside C code."""


def run_rank(job: Job, run: str, job_file: str, threads: int, attempt_logs: str) -> int:
    """The body of one rank process; the agent gets its return value (0 or 75), or its exit code."""
    die_with_parent()
    rank, attempt = int(os.environ["RANK"]), int(os.environ["MUSTER_ATTEMPT"])
    _redirect(Path(attempt_logs) / f"rank-{rank}.log")
    stacks = _open_stacks(Path(run) / "logs" / f"stacks-rank-{rank}.txt")
    faulthandler.register(STACKS, stacks, all_threads=True, chain=False)
    faulthandler.enable(sys.stderr)  # a crash in native code leaves a Python stack in the log
    try:
        import torch

        torch.set_num_threads(threads)
        if job.script:
            return _run_script(job)
        from trainer.rank import train

        return train(job, Path(run), Path(job_file))
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else (DONE if exit_.code is None else FAILED)
        if code in (DONE, STOPPED):
            return code
        _fail(Path(run), attempt, rank, exit_, code)
    except BaseException as error:
        _fail(Path(run), attempt, rank, error, WRONG_JOB if isinstance(error, JobError) else FAILED)
    raise AssertionError("unreachable")


def die_with_parent() -> None:
    """Bind this process to the template, and so to the agent: SIGKILL follows when either is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:  # held open, it would keep the template alive without its agent
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


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


def _open_stacks(path: Path) -> IO[str]:
    return path.open("a")


def _run_script(job: Job) -> int:
    """Run the user's script as `python script.py` would, with signals as a script expects them."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    script = str(job.script)
    sys.argv = [script, *map(str, job.script_args)]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
    return DONE


def _fail(run: Path, attempt: int, rank: int, error: BaseException, code: int) -> None:
    """Leave a record for the post-mortem, and the traceback in the log; end with `code`."""
    text = "" if isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
    if isinstance(error, JobError):
        print(f"ERROR: {error}", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
    record = {
        "rank": rank, "host": socket.gethostname(), "time": time.time(), "code": code,
        "exception": type(error).__name__, "message": str(error)[:4000], "traceback": text[-8000:],
        "chain": [type(item).__name__ for item in _chain(error)],
    }  # fmt: skip
    folder = run / "failures"
    folder.mkdir(exist_ok=True)
    (folder / f"attempt-{attempt}-rank-{rank}.json").write_text(json.dumps(record))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: finalizers of a broken process group can hang


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
