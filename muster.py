"""What users import: `from muster import Task`. Names are looked up when asked for: importing this costs nothing.

It is also how our programs are started, because projects have modules called `trainer` too: `python -m muster` is the
command, `python -m muster agent JOB.yaml` the agent of a node. They find our package whatever the working directory and
PYTHONPATH hold.
"""

import importlib
import os
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.adapters import huggingface, lightning
    from trainer.task import Task
    from trainer.training.session import Session

__all__ = ["Session", "Task", "huggingface", "lightning"]
HOMES = {"Session": "trainer.training.session", "Task": "trainer.task", "__version__": "trainer"}
ADAPTERS = ("huggingface", "lightning")
"""Modules that need what an extra of the same name installs."""
PROGRAMS = {
    "agent": "trainer", "supervisor": "trainer.launch.local.supervisor", "there": "trainer.launch.ssh.there",
}  # fmt: skip
"""What platforms start, by its first word; each is a module that runs."""


def __getattr__(name: str) -> Any:
    if name in ADAPTERS or name in HOMES:
        reach_package()
    if name in ADAPTERS:
        try:
            return importlib.import_module(f"trainer.adapters.{name}")
        except ModuleNotFoundError as error:
            raise ImportError(f'muster.{name} needs {error.name}: pip install "muster-train[{name}]"') from error
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def reach_package() -> None:
    """Let our modules be found where a script has a `trainer` of its own, which then is the parent of both.

    Raises ImportError: it has parts that are called as ours are.
    """
    ours = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trainer")
    if "trainer" not in sys.modules and not _main_imports_trainer():
        import_package()
    present = importlib.import_module("trainer")
    places = list(getattr(present, "__path__", ()))
    if ours in places:
        return
    names = {name.partition(".")[0] for name in os.listdir(ours)}
    theirs = {name.partition(".")[0] for place in places for name in os.listdir(place)} | set(vars(present))
    clash = ", ".join(sorted(name for name in names & theirs if not name.startswith("_")))
    if {"agent", "launch", "wiring"} <= theirs:
        return  # it is Muster's, of another copy: the one that runs counts
    if clash:
        raise ImportError(
            f"your own module trainer ({present.__file__}) has parts with names of Muster's own: {clash}. Rename it: "
            "beside a session both are needed"
        )
    present.__path__ = [*places, ours]


def _main_imports_trainer() -> bool:
    """Whether the script wants its own: what it does not import is not run for it."""
    try:
        with open(sys.modules["__main__"].__file__ or "", encoding="utf-8") as file:
            return re.search(r"^\s*(from|import)\s+trainer\b", file.read(), re.MULTILINE) is not None
    except (AttributeError, OSError, UnicodeDecodeError):
        return False


def import_package() -> None:
    """Import the `trainer` that lies beside this file; from then on its modules are found through it."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    try:
        importlib.import_module("trainer")
    finally:
        del sys.path[0]


def main() -> None:
    """The `muster` command."""
    import_package()
    importlib.import_module("trainer.launch.cli").main()


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):  # since Python 3.11
        del sys.path[0]  # the working directory, whose modules are the user's, or the folder of this file
    import_package()
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        importlib.import_module("runpy").run_module(PROGRAMS[sys.argv.pop(1)], run_name="__main__", alter_sys=True)
    else:
        main()
