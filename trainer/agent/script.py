"""A user's script inside of a rank: as `python -u script.py` would run it, though the process was forked.

An interpreter of its own would import torch for every rank. Here a rank has it already, and what that leaves behind
(modules, random numbers, the start method of processes) is undone before the first line of the script.
"""

import atexit
import builtins
import contextlib
import functools
import gc
import importlib.util
import io
import multiprocessing
import os
import socket
import sys
import sysconfig
import threading
from collections.abc import Callable
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from trainer.agent.fork_server import ROOT
from trainer.config.job import Job
from trainer.config.user_code import MODULE, import_paths, python_folders
from trainer.errors import JobError
from trainer.run.folder import RunFolder, last_event
from trainer.run.summary import separate_ranks
from trainer.signals import restore_signals
from trainer.wiring.rank import RankWiring, serve_store_elsewhere

OURS = __name__.partition(".")[0]
"""The name of our package, which a project's may have too."""


def run_script(job: Job, job_file: Path | None) -> int:
    """Run the user's script to its end; return its exit code. Raises what it raises, and JobError: no such file."""
    restore_signals()
    _be_main_process()
    multiprocessing.set_start_method(None, force=True)  # not chosen yet: a rank's own is that of the fork server
    script = str(job.script)
    is_module = script.startswith(MODULE)
    first = Path.cwd() if is_module else Path(script).resolve().parent
    wanted = dict.fromkeys(map(str, (first, *import_paths(job_file, job.python_path))))
    sys.path[:] = [*wanted, *(path for path in sys.path if path not in wanted)]
    own = [str(folder) for folder in python_folders(job_file, job.python_path) if ":" not in str(folder)]
    if own:  # for programs that the script starts
        os.environ["PYTHONPATH"] = ":".join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
    forget_modules()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # or all ranks would draw the same; `random` does so after each fork
    main, code = _load(script)
    sys.argv = [str(main.__file__) if is_module else script, *job.script_args]
    sys.orig_argv = [sys.executable, "-u", *(script.split() if is_module else [script]), *job.script_args]
    sys.modules["__main__"] = main
    try:
        exec(code, vars(main))
    except SystemExit as exit_:
        if not isinstance(exit_.code, (int, type(None))):
            raise  # a message: Python prints it, and ends with 1
        return (exit_.code or 0) & 0xFF
    return 0


def _be_main_process() -> None:
    """Answer as the process does that an interpreter starts with; the script's own processes are its children."""
    multiprocessing.current_process().name = "MainProcess"
    parent_of, rank = multiprocessing.parent_process, os.getpid()
    for module in (multiprocessing, multiprocessing.process):
        setattr(module, "parent_process", lambda: None if os.getpid() == rank else parent_of())  # noqa: B010


def _load(script: str) -> tuple[ModuleType, CodeType]:
    """The module `__main__` of a script, or of `-m package.module`, as Python makes it, and its code."""
    main = ModuleType("__main__")
    if script.startswith(MODULE):
        name = script.removeprefix(MODULE).strip()
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        loader: Any = spec.loader if spec else None
        if spec is None or not hasattr(loader, "get_code"):
            remedy = f"It must be importable from {os.getcwd()}; set python_path if it lies elsewhere"
            raise JobError("script", script, f"no module {name} that can be run", remedy)
        code = loader.get_code(spec.name)
        main.__spec__, main.__package__, main.__loader__, main.__file__ = spec, spec.parent, loader, spec.origin
    else:
        if not Path(script).is_file():
            problem = f"no such file on {socket.gethostname()}"
            raise JobError("script", script, problem, f"Working directory: {os.getcwd()}")
        path = os.path.abspath(script)
        code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
        main.__loader__, main.__file__ = SourceFileLoader("__main__", path), path
    vars(main).update({"__builtins__": builtins, "__cached__": None, "__annotations__": {}})
    return main, code


def forget_modules() -> None:
    """Forget modules that were imported from elsewhere than the script would import them from.

    What lies in its folder or in PYTHONPATH may be called as ours or as a part of torch is: `trainer`, `profile`. What
    Python itself starts with, a script cannot replace.
    """
    library = sysconfig.get_path("stdlib")
    own = sys.path[: sys.path.index(library)] if library in sys.path else sys.path
    shadowed = set()
    for name in {name.partition(".")[0] for name in sys.modules} - set(sys.builtin_module_names) - {"__main__"}:
        spec = PathFinder.find_spec(name, own)
        present = getattr(getattr(sys.modules.get(name), "__spec__", None), "origin", None)
        if spec is not None and spec.loader is not None and spec.origin not in (present, None) and present != "frozen":
            shadowed.add(name)
    spec = PathFinder.find_spec(OURS, [path for path in own if path != ROOT])
    folders = list(spec.submodule_search_locations or ()) if spec and spec.loader is None else []
    if any(next(Path(folder).rglob("*.py"), None) for folder in folders):  # without __init__.py, ours would come first
        shadowed.add(OURS)
    for name in list(sys.modules):
        if name.partition(".")[0] in shadowed:
            del sys.modules[name]
    if spec is not None and spec.loader is None and OURS in shadowed:
        sys.modules[OURS] = importlib.util.module_from_spec(spec)


def end_script(done: bool) -> None:
    """Do what an interpreter does at its end: a process of `multiprocessing` does not, before Python 3.14.

    Private names, because there are no public ones. The threads of a script that failed are not waited for.
    """
    with contextlib.suppress(BaseException):
        if done:
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    files = [item for item in gc.get_objects() if issubclass(type(item), io.IOBase)]
    for kind in (io.TextIOBase, io.IOBase):  # what a text file still holds goes into a binary one
        for file in files:
            with contextlib.suppress(Exception):
                if isinstance(file, kind):
                    file.flush()  # of a file that was never closed


def watch_process_group(run: RunFolder, wiring: RankWiring) -> None:
    """Let rank 0 record that it joined a process group, and serve the store where a script sets its own port."""
    from torch import distributed

    if not distributed.is_available():
        return
    join, stay = distributed.init_process_group, serve_store_elsewhere()

    @functools.wraps(join)
    def init_process_group(*args: Any, **options: Any) -> None:
        stay(options.get("init_method") or (args[1] if len(args) > 1 else None))
        join(*args, **options)
        if wiring.rank == 0:
            with contextlib.suppress(OSError):
                run.record("process_group", attempt=wiring.attempt, ranks=distributed.get_world_size())

    for module in list(sys.modules.values()):  # parts of torch, such as device meshes, call it by a name of their own
        if getattr(module, "__dict__", {}).get("init_process_group") is join:
            setattr(module, "init_process_group", init_process_group)  # noqa: B010


def report_separate_ranks(job: Job, run: RunFolder, say: Callable[[str], None]) -> None:
    """Record and say so when the ranks of a script that is done never met."""
    joined = last_event(run.read_main_events(), "process_group", "attempt", "restart")
    if job.script and job.world_size > 1 and (joined or {}).get("ranks", 1) == 1:
        run.record("separate_ranks", ranks=job.world_size)
        say(separate_ranks(run))
