"""What an environment of Python on another machine must hold: Muster's own packages, and those that a project lists.

The project's lists are those that its image is made from: see `trainer.launch.dockerfile`.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from trainer.errors import JobError
from trainer.launch.dockerfile import DEPENDENCIES, INCLUDED, LISTS, LOCAL
from trainer.launch.site import ours

LAUNCH_ONLY = ("cloudpickle", "omegaconf", "pyyaml", "submitit", "typing-extensions")
"""What submits and asks needs, where the ranks have an image."""
TOOLS = ("dumb-init", "pip", "setuptools")
"""Of the lock file, what only an image needs."""
TORCH = re.compile(r"^torch(?![\w.-])", re.MULTILINE)


def requirements(code: Path, launch_only: bool) -> dict[str, str]:
    """The files from which an environment is made: ours with hashes; torch, and what the project lists, without.

    Raises JobError: what the project needs cannot be told.
    """
    parts = re.split(r"\n(?=\S)", ours("docker/lock.txt").read_text())
    named = {part: re.sub("[-_.]+", "-", part[: re.search(r"[^\w.-]|$", part).start()]).lower() for part in parts}  # type: ignore[union-attr]
    locked = [part for part, name in named.items() if name and name not in TOOLS]
    if launch_only:
        return {"locked.txt": "\n".join(part for part in locked if named[part] in LAUNCH_ONLY) + "\n", "others.txt": ""}
    listed, constraints = _listed(code)
    version = "" if TORCH.search(constraints) else f"=={metadata.version('torch').partition('+')[0]}"
    torch = "" if TORCH.search(listed) else f"torch{version}\n"
    files = {"locked.txt": "\n".join(locked) + "\n", "others.txt": torch + listed}
    if constraints:  # for pip, their name is relative to the file that says it
        files |= {"constraints.txt": constraints, "others.txt": "-c constraints.txt\n" + files["others.txt"]}
    return files


def environment_name(wanted: dict[str, str]) -> str:
    """The folder of the environment that is made from such files."""
    return "python-" + hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]


def _listed(code: Path) -> tuple[str, str]:
    """What the project lists, as the text of one file; and its constraints, as another."""
    found = next((name for name in LISTS if (code / name).is_file()), None)
    if found == "requirements.txt":
        lines = list(_lines(code, found, False, set()))
        of_kind = ([line for is_limit, line in lines if is_limit == kind] for kind in (False, True))
        listed, limits = ("".join(f"{line}\n" for line in each) for each in of_kind)
        return listed, limits
    if found == "pyproject.toml":
        return _ask([sys.executable, "-c", DEPENDENCIES], code, found), ""
    if found == "uv.lock":
        words = "export --quiet --frozen --no-dev --no-emit-workspace --no-hashes"
        return _ask(["uv", *words.split()], code, found), ""
    if found is not None:
        raise JobError("python", None, f"{found} is not read for another machine", f"Set `python`, or add {LISTS[2]}")
    return "", ""


def _lines(code: Path, name: str, limits: bool, seen: set[tuple[Path, bool]]) -> Iterator[tuple[bool, str]]:
    """The lines of a list, and of those that it includes, less those that mean code, which comes with the run.

    Each with whether it is a constraint; `limits`: whether all are. What is at an address is left to pip over there.
    Raises JobError: a list is missing.
    """
    if (key := ((code / name).resolve(), limits)) in seen:
        return
    seen.add(key)
    try:
        text = (code / name).read_text(errors="replace")
    except OSError:
        remedy = "Add it where git does not ignore it, or set `python` in the site file"
        raise JobError("python", None, f"your requirements include {name}, which is not in {code}", remedy) from None
    for line in text.splitlines():
        included = INCLUDED.match(line)
        if included and "://" not in included[1]:
            inner = os.path.normpath(Path(name).parent / included[1])
            yield from _lines(code, inner, limits or included[0].lstrip(" \t-").startswith("c"), seen)
        elif not re.match(LOCAL, line):
            yield limits, line


def _ask(command: list[str], code: Path, name: str) -> str:
    try:
        done = subprocess.run(command, cwd=code, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise JobError("python", None, f"{name} cannot be read: {said[-1]}", "Set `python` in the site file") from None
    return done.stdout
