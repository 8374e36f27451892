"""Where in the user's code an exception came from, read off its traceback."""

import os
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

FILE = re.compile(r'File "([^"]+)", line (\d+)')
TRAINER = Path(__file__).parents[1]
LIBRARY = Path(sysconfig.get_path("stdlib"))
INSTALLED = {"site-packages", "dist-packages"}


def place_of(traceback: str, roots: Iterable[Path] = ()) -> str:
    """`file:line` of the innermost frame of the user's own code, else of the innermost one; empty without any.

    A file below one of the `roots`, or of the working directory, is named from there. Of exceptions that a loader
    worker sent, the message holds the worker's own traceback, which comes last.
    """
    frames = [(Path(file), line) for file, line in FILE.findall(traceback) if not file.startswith("<")]
    if not frames:
        return ""
    file, line = next((frame for frame in reversed(frames) if _is_users(frame[0])), frames[-1])
    for root in (*roots, Path(os.getcwd())):
        if file.is_relative_to(root):
            return f"{file.relative_to(root)}:{line}"
    return f"{file}:{line}"


def is_ours(file: Path) -> bool:
    """Whether a file is Muster's; its tasks count as a user's."""
    return file.is_relative_to(TRAINER) and not file.is_relative_to(TRAINER / "tasks")


def _is_users(file: Path) -> bool:
    return not (INSTALLED & set(file.parts) or is_ours(file) or file.is_relative_to(LIBRARY))
