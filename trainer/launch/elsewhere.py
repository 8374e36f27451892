"""Modules that the user's code imports and that lie neither beside it nor among the installed packages.

They are installed editable, or found by PYTHONPATH. A run takes a copy of them along, as of the code: nodes may lack
them, and edits made meanwhile would change the run. What cannot be copied is named.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from trainer.config.job import Job
from trainer.config.user_code import MODULE, PACKAGES
from trainer.launch.source_files import copy_files, list_files

LIMIT_MB = 10
"""A larger package has more than code in it."""
COMPILED = (".so", ".pyd", ".dylib")
IMPORT = re.compile(r"(?:^|[;:])[ \t]*(?:from[ \t]+([A-Za-z_]\w*)|import[ \t]+([^#\n;]+))", re.MULTILINE)
OURS = ("trainer", "muster")


def take_modules(source: Path, code: Path, job: Job, own: Iterable[Path]) -> list[str]:
    """Add to `code`, the copy of `source`, what it imports from elsewhere; return notes on what is and is not copied.

    `own`: the folders that the job's code is imported from.
    """
    notes, seen = [], {*sys.stdlib_module_names, *OURS}
    beside = {place.resolve() for place in own}
    copies = [code / place.relative_to(source) for place in beside if place.is_relative_to(source)]
    names = {*_named_by(job), *_imports(code)} - seen
    while names:
        name = min(names)
        seen.add(name)
        paths = [path for path in _find(name) if path.parent not in beside and not _is_installed(path)]
        if any((copy / name).is_dir() or (copy / f"{name}.py").is_file() for copy in copies):
            paths = []  # which comes first
        for path in paths:
            problem, left_out = _take(name, path, source, code)
            kept = f"is not copied, because {problem}: the nodes use their own" if problem else "goes along as a copy"
            notes += [f"the module {name}, which your code imports from {path}, {kept}", *left_out]
        if paths:
            _keep_version(name, code / PACKAGES)
            names |= _imports(code / PACKAGES)
        names -= seen
    return notes


def _named_by(job: Job) -> Iterator[str]:
    """The first parts of the modules that a job names."""
    named = [job.task or "", *(text for text in (job.train.optimizer, job.train.schedule) if ":" in text), *job.preload]
    named += [job.script.removeprefix(MODULE)] if (job.script or "").startswith(MODULE) and job.script else []
    yield from (found[0] for text in named if (found := re.match(r"\w+", text.strip())))


def _imports(folder: Path) -> set[str]:
    """The first parts of the modules that files below a folder import."""
    found = set()
    for path in folder.rglob("*.py"):
        with contextlib.suppress(OSError):  # a link to nothing
            for one, several in IMPORT.findall(path.read_text(errors="replace")):
                found |= {one} if one else set(re.findall(r"(?:^|,)\s*([A-Za-z_]\w*)", several))
    return found


def _find(name: str) -> list[Path]:
    """The file or the folders of a module. It is not imported."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None or not (spec.submodule_search_locations or spec.has_location):
        return []
    places = spec.submodule_search_locations or [spec.origin or ""]
    return [path.resolve() for path in map(Path, places) if path.exists()]


def _is_installed(path: Path) -> bool:
    return any(path.is_relative_to(place) for place in _installations())


@functools.cache
def _installations() -> set[Path]:
    """Where this interpreter has its own modules, and what is installed for it."""
    paths = {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()} - {sys.prefix}
    paths |= {place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")}
    return {Path(place).resolve() for place in paths}


def _take(name: str, path: Path, source: Path, code: Path) -> tuple[str, list[str]]:
    """Copy a module, or link to its place in the copy of `source`.

    Return the reason if it stays behind, and notes on files that do.
    """
    target = code / PACKAGES / (f"{name}{path.suffix}" if path.is_file() else name)
    target.parent.mkdir(parents=True, exist_ok=True)
    copied = code / path.relative_to(source) if path.is_relative_to(source) else None
    if copied and copied.exists() and not target.exists():
        target.symlink_to(os.path.relpath(copied, target.parent))
        return "", []
    if path.suffix in COMPILED or any(name.endswith(COMPILED) for _, _, names in os.walk(path) for name in names):
        return "it has compiled parts", []
    names, notes = ([""], []) if path.is_file() else list_files(path, lambda _: False)
    names = [name for name in names if (path / name).is_file()]
    if sum((path / name).stat().st_size for name in names) > LIMIT_MB << 20:
        return f"it has more than {LIMIT_MB} MiB", []
    copy_files(path, target, names)
    return "", notes


def _keep_version(name: str, folder: Path) -> None:
    """Let the module find its version by `importlib.metadata`, as many do when they are imported."""
    owners = _owners(tuple(sys.path)).get(name, [])
    owner = owners[0] if len(owners) == 1 else name  # of a namespace that several share, nobody
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(owner)
        info = folder / f"{re.sub('[-.]+', '_', owner)}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {owner}\nVersion: {version}\n")


@functools.cache
def _owners(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Which installed packages have which modules, by the folders of `sys.path`."""
    return importlib.metadata.packages_distributions()
