"""What an environment of Python on another machine must hold: Muster's own packages, and those that a project lists.

The project's lists are those that its image is made from: see `trainer.launch.dockerfile`.
"""

import hashlib
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from trainer.errors import JobError
from trainer.launch.dockerfile import DEPENDENCIES, INCLUDED, LISTS, LOCAL
from trainer.launch.site import template

LAUNCH_ONLY = ("cloudpickle", "omegaconf", "pyyaml", "submitit", "typing-extensions")
"""What submits and asks needs, where the ranks have an image."""
TOOLS = ("dumb-init", "pip", "setuptools")
"""Of the lock file, what only an image needs."""
TORCH = re.compile(r"^torch(?![\w.-])", re.MULTILINE)


def requirements(code: Path, launch_only: bool) -> dict[str, str]:
    """The files from which an environment is made: ours with hashes; torch, and what the project lists, without.

    Raises JobError: what the project needs cannot be told.
    """
    parts = re.split(r"\n(?=\S)", template("docker", "lock.txt").read_text())
    named = {part: re.sub("[-_.]+", "-", part[: re.search(r"[^\w.-]|$", part).start()]).lower() for part in parts}  # type: ignore[union-attr]
    locked = [part for part, name in named.items() if name and name not in TOOLS]
    if launch_only:
        return {"locked.txt": "\n".join(part for part in locked if named[part] in LAUNCH_ONLY) + "\n", "others.txt": ""}
    listed = _listed(code)
    torch = "" if TORCH.search(listed) else f"torch=={metadata.version('torch').partition('+')[0]}\n"
    return {"locked.txt": "\n".join(locked) + "\n", "others.txt": torch + listed}


def environment_name(wanted: dict[str, str]) -> str:
    """The folder of the environment that is made from such files."""
    return "python-" + hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]


def _listed(code: Path) -> str:
    """What the project lists, as the text of one file."""
    found = next((name for name in LISTS if (code / name).is_file()), None)
    if found == "requirements.txt":
        return "\n".join(_lines(code, found)) + "\n"
    if found == "pyproject.toml":
        return _ask([sys.executable, "-c", DEPENDENCIES], code, found)
    if found == "uv.lock":
        words = "export --quiet --frozen --no-dev --no-emit-workspace --no-hashes"
        return _ask(["uv", *words.split()], code, found)
    if found is not None:
        raise JobError("python", None, f"{found} is not read for another machine", f"Set `python`, or add {LISTS[2]}")
    return ""


def _lines(code: Path, name: str) -> list[str]:
    """The lines of a list, and of those that it includes, less those that mean code, which comes with the run."""
    lines: list[str] = []
    for line in (code / name).read_text(errors="replace").splitlines():
        if included := INCLUDED.match(line):
            lines += _lines(code, (Path(name).parent / included[1]).as_posix())
        elif not re.match(LOCAL, line):
            lines.append(line)
    return lines


def _ask(command: list[str], code: Path, name: str) -> str:
    try:
        done = subprocess.run(command, cwd=code, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise JobError("python", None, f"{name} cannot be read: {said[-1]}", "Set `python` in the site file") from None
    return done.stdout
