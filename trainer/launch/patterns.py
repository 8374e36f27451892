"""`snapshot.include` and `snapshot.exclude`: patterns as in .gitignore, and the files that they choose."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trainer.errors import JobError

PARTS = re.compile(r"(^|(?<=/))\*\*/|(?<=/)\*\*$|\*|\?|\[!?[^]]+\]|\\.|[^*?[\\]+|.", re.DOTALL)


def chosen(key: str, pattern: str, names: Iterable[str]) -> set[str]:
    """The names that a pattern matches, itself or by a folder around them. Raises JobError: it matches none."""
    expression = _expression(key, pattern)
    found = {name for name in names if expression.fullmatch(name)}
    if not found:
        what = "no file of the folder" if key.endswith("include") else "none of the files that would be copied"
        raise JobError(
            key, pattern, f"matches {what}", "Correct it, or remove it. It is read like a line of .gitignore"
        )
    return found


def _expression(key: str, pattern: str) -> re.Pattern[str]:
    body = re.sub(r"^\./", "/", pattern.strip())
    if body.startswith("!") or not body.strip("/") or ".." in body.split("/"):
        remedy = "Give a pattern for files of the working directory; snapshot.exclude says what is not to be copied"
        raise JobError(key, pattern, "is not a pattern for files of the working directory", remedy)
    anywhere = "" if "/" in body.rstrip("/") else "(?:.*/)?"
    inside = "/.*" if body.endswith("/") else "(?:/.*)?"
    return re.compile(anywhere + "".join(map(_translate, PARTS.finditer(body.strip("/")))) + inside, re.DOTALL)


def _translate(part: re.Match[str]) -> str:
    text = part[0]
    if text[0] == "[" and len(text) > 1:
        return "(?!/)[" + ("^" if text[1] == "!" else "") + text.removeprefix("[").removeprefix("!")
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return special.get(text) or re.escape(text[1:] if text[0] == "\\" and len(text) > 1 else text)


def all_files(folder: Path, skip: Callable[[Path], bool]) -> Iterator[str]:
    """Every file below a folder, ignored or hidden; without repositories, Python environments and what `skip` names."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if name != ".git" and not (here / name / "pyvenv.cfg").exists()]
        folders[:] = [name for name in folders if not skip(here / name)]
        yield from (str((here / name).relative_to(folder)) for name in files)
