"""`python -m trainer JOB.yaml [key=value ...]`: the agent of one node, or, under another launcher, one rank."""

from trainer.signals import FLAG, ignore_signals

FLAG.install()  # before all else: a stop request may come at any moment

import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from trainer.agent.fork_server import ensure_fork_server, prepare_fork_server  # noqa: E402
from trainer.agent.health import check_health  # noqa: E402
from trainer.agent.last_word import judge, leave_for  # noqa: E402
from trainer.agent.late_files import await_job  # noqa: E402
from trainer.agent.scratch_folder import shorten_temporary_folder  # noqa: E402
from trainer.errors import DONE, WRONG_JOB, JobError, did_you_mean  # noqa: E402
from trainer.run.folder import find_job, run_of  # noqa: E402
from trainer.run.output import never_fail  # noqa: E402
from trainer.run.ownership import ForeignRun, check_owner, forbid_group_writes  # noqa: E402
from trainer.wiring.hardware import raise_open_files  # noqa: E402
from trainer.wiring.rank import is_rank  # noqa: E402
from trainer.wiring.secret import drop_secret, read_secret, source_of_secret  # noqa: E402
from trainer.wiring.variables import PLATFORM  # noqa: E402

USAGE = """usage: python -m trainer JOB.yaml [--explain] [key=value ...]
       python -m trainer --health

JOB.yaml    a job file, or the job.yaml of a run folder, which is continued
--explain   print how this node would be wired, where each value comes from, and what preflight says; start nothing
--health    exit 0 when an agent runs in this container and its ranks give signs of life
"""

IN_CONTAINERS = ("docker", "kubernetes")
"""Platforms whose agents see the run folder through a volume, which may show other owners than there are outside."""
NAMES_SCRIPT = r"^script(=|:[ \t]*(?!null\b|~|#)\S)"
"""How a line of a job file, or an override, begins that names a script."""


def main(arguments: list[str]) -> int:
    """Parse the command line and do what it says; return the exit code."""
    options = [argument for argument in arguments if argument.startswith("--")]
    operands = [argument for argument in arguments if not argument.startswith("--")]
    if "--help" in options:
        print(USAGE, end="")
        return DONE
    if "--health" in options:
        return check_health()
    for unknown in set(options) - {"--explain"}:
        remedy = did_you_mean(unknown, ("--explain", "--health", "--help"), "See --help")
        raise JobError("option", unknown, "is unknown", remedy)
    if not operands:
        print(USAGE, file=sys.stderr, end="")
        return WRONG_JOB
    shorten_temporary_folder()
    raise_open_files()
    forbid_group_writes()
    path, overrides = find_job(await_job(Path(operands[0]))), operands[1:]
    run = run_of(path)
    if run is not None and run.exists() and os.environ.get(PLATFORM) not in IN_CONTAINERS:
        check_owner(run)
    if is_rank():
        drop_secret()
        if "PYTHONHASHSEED" not in os.environ:  # read when Python starts: the order of sets
            os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONHASHSEED": "0"})
        from trainer.agent.external_rank import run_external_rank

        return run_external_rank(path, overrides)
    secret_file = run.secret if run else None
    source = source_of_secret(secret_file)
    secret = read_secret(secret_file)  # before anything inherits our environment
    if "--explain" not in options:
        text = _read(path, overrides)
        prepare_fork_server("script" if re.search(NAMES_SCRIPT, text, re.MULTILINE) else "task")
        if "preload" not in text:  # or it starts when the job is loaded, which says what to import
            ensure_fork_server()  # it imports torch while we go on
    from trainer.agent import node

    return node.explain(path, overrides, source) if "--explain" in options else node.run_node(path, overrides, secret)


def _read(path: Path, overrides: list[str]) -> str:
    """The job as it is written. It is not loaded yet: this only decides what is imported early."""
    try:
        text = path.read_text(errors="replace")
    except OSError:  # who loads the job will say so
        text = ""
    return "\n".join([text, *overrides])


def run() -> None:
    """Entry point: an error of the user ends in one line and exit code 64, any other in a traceback and 1."""
    never_fail()
    try:
        code = main(sys.argv[1:])
    except Exception as error:
        code = _explain(error)
    finally:
        ignore_signals()
    sys.exit(code)


def _explain(error: Exception) -> int:
    """Say why this process ends, here and where the run and the platform keep it; return the exit code."""
    code, reason = judge(error)
    if code == WRONG_JOB:
        print(f"ERROR: {reason}", file=sys.stderr)
    only_asks = any(argument.startswith("--") for argument in sys.argv[1:])
    if not only_asks and not isinstance(error, ForeignRun):
        leave_for(sys.argv[1], code, reason)
    return code


if __name__ == "__main__":
    run()
