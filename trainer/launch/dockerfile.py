"""The Dockerfile of a project: one is made for a project that has none, and of any it is told what it is made of."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from trainer.launch.snapshot import of_runs
from trainer.launch.source_files import list_files

LISTS = ("uv.lock", "pylock.toml", "requirements.txt", "pyproject.toml")
"""What an image's packages can be read from; the first that a project has counts."""
LISTED = re.compile(r"^dependencies\s*=", re.MULTILINE)
"""In a pyproject.toml that lists them itself: not those of other tools, and not `dynamic` ones."""
UNREAD = ("poetry.lock", "environment.yml", "environment.yaml", "Pipfile", "setup.py", "setup.cfg")
DEPENDENCIES = (
    "import importlib, sys; "
    "toml = importlib.import_module('tomllib' if sys.version_info >= (3, 11) else 'pip._vendor.tomli'); "
    "project = toml.load(open('pyproject.toml', 'rb')).get('project', {}); "
    "print(*project.get('dependencies', []), sep='\\n')"
)
PIP = "pip install --no-cache-dir"
SECRET = "--mount=type=secret,id=pip.conf,target=/etc/pip.conf"
"""For an index with a password, which no layer may hold."""
INCLUDED = re.compile(r"^\s*(?:-r|-c|--requirement|--constraint)[\s=]*([^\s#]+)", re.MULTILINE)
ARCHIVE = re.compile(r"^\s*(\S+\.(?:whl|zip|gz))\s*$", re.MULTILINE)
LOCAL = r"^\s*((-e|--editable)[ =]+[^:]*|\.{1,2}(/.*|\[.*|\s*))$"
"""A line that means a folder of this machine, whose code comes with the run, or an archive."""
OURS = re.compile(r"^FROM\s+(?:--\S+\s+)?muster(?::latest)?(?=\s|$)", re.MULTILINE | re.IGNORECASE)


def dockerfile(folder: Path) -> str:
    """A Dockerfile with what the project needs beside Muster, on top of Muster's image."""
    lines = [
        "# The image of this project, which `muster image` builds on top of Muster's own, `muster`.",
        "# Your code is not in it: each run takes a copy of its own along, so an edit needs no build.",
        "FROM muster",
    ]
    found = package_list(folder)
    if found:
        lines += ["USER root", *_installation(folder, found), "USER 10001:10001"]
    return "\n".join([*lines, ""])


def package_list(folder: Path) -> str | None:
    """The file that the project's packages are read from."""
    for name in LISTS:
        if (folder / name).is_file() and (
            name != LISTS[-1] or LISTED.search((folder / name).read_text(errors="replace"))
        ):
            return name
    return None


def unread(folder: Path) -> str | None:
    """A file that may list packages, and is not read, where there is none that is."""
    others = [name for name in UNREAD if (folder / name).exists()]
    if (folder / LISTS[-1]).is_file() and re.search("poetry|dynamic", (folder / LISTS[-1]).read_text(errors="replace")):
        others.append(LISTS[-1])
    return others[0] if others and package_list(folder) is None else None


def _installation(folder: Path, found: str) -> list[str]:
    run = f"RUN {SECRET} \\\n    "
    from_input = f"{PIP} --requirement /dev/stdin"
    of_project = f'python3 -c "{DEPENDENCIES}" | {from_input}'
    if found == "uv.lock":
        export = "uv export --quiet --frozen --no-dev --no-emit-workspace"
        return ["COPY uv.lock pyproject.toml ./", f"{run}{PIP} uv && {export} | {from_input}"]
    if found == "pyproject.toml":
        return [f"COPY {found} ./", run + of_project]
    files = _requirement_files(folder, found, [])
    lines = [f"COPY {name} {Path(name).parent.as_posix()}/" for name in files]
    listed = [name for name in files if name.endswith(".txt")]
    if any(_names_folder(line) for name in listed for line in (folder / name).read_text(errors="replace").splitlines()):
        lines.append(f"RUN sed --in-place --regexp-extended '/(whl|zip|gz)$/!{{\\#{LOCAL}#d}}' {' '.join(listed)}")
        if (folder / "pyproject.toml").is_file():
            lines += ["COPY pyproject.toml ./", run + of_project]
    return [*lines, f"{run}{PIP} --requirement {found}"]


def _names_folder(line: str) -> bool:
    return bool(re.match(LOCAL, line)) and not ARCHIVE.match(line)


def _requirement_files(folder: Path, name: str, found: list[str]) -> list[str]:
    """Add to `found` a file of requirements, those that it includes, and archives beside it."""
    found.append(name)
    text = (folder / name).read_text(errors="replace") if name.endswith(".txt") else ""
    for included in (*INCLUDED.findall(text), *ARCHIVE.findall(text)):
        inner = os.path.normpath(Path(name).parent / included)
        if "://" not in included and inner not in found and (folder / inner).is_file():
            _requirement_files(folder, inner, found)
    return found


def sources(folder: Path, text: str) -> list[str]:
    """The files of `folder` that a Dockerfile reads: of a folder, those that git does not ignore."""
    found: set[str] = set()
    code: list[str] | None = None
    for pattern in _read_by(text):
        for path in folder.glob(pattern) if pattern != "." else [folder]:
            if not path.is_dir():
                found.add(path.relative_to(folder).as_posix())
                continue
            code = list_files(folder, of_runs(folder, folder / "runs"))[0] if code is None else code
            inside = [name for name in code if (folder / name).is_relative_to(path)]
            inside = inside or [str(each.relative_to(folder)) for each in path.rglob("*") if each.is_file()]
            found |= set(inside)
    return sorted(found)


def _read_by(text: str) -> Iterator[str]:
    """What COPY, ADD and mounts name, as patterns below the folder."""
    for line in re.sub(r"\\[ \t]*\n", " ", text).splitlines():
        word, *rest = line.split() or [""]
        names: list[str] = []
        if word.upper() == "RUN":
            mounts = [dict(part.partition("=")[::2] for part in each.split(",")) for each in _options(rest, "--mount=")]
            bound = [each for each in mounts if each.get("type", "bind") == "bind" and "from" not in each]
            names = [each.get("source") or each.get("src") or "." for each in bound]
        elif word.upper() in ("COPY", "ADD") and not _options(rest, "--from="):
            rest = [each for each in rest if not each.startswith("--")]
            listed = re.findall(r'"([^"]*)"', line) if rest[:1] and rest[0].startswith("[") else rest
            names = [each for each in listed[:-1] if "://" not in each and not each.startswith("<<")]
        yield from (each.lstrip("/").removeprefix("./").rstrip("/") or "." for each in names)


def _options(words: list[str], name: str) -> list[str]:
    return [word.removeprefix(name) for word in words if word.startswith(name)]
