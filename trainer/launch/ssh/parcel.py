"""What is sent to another machine: Muster itself, the user's code, and what its environment of Python must hold.

A parcel is named by its content, so equal ones are sent once.
"""

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import trainer
from trainer.errors import JobError

PACKAGE = Path(trainer.__file__).resolve().parent
TEMPLATES = ("docker", "jobs", "k8s", "slurm")
LAUNCH_ONLY = ("cloudpickle", "omegaconf", "pyyaml", "submitit", "typing-extensions")
"""What submits and asks needs, where the ranks have an image."""
TOOLS = ("dumb-init", "pip", "setuptools")
"""Of the lock file, what only an image needs."""
LISTS = "requirements.txt"
OF_FILES = re.compile(r"^\s*(-r|-c|-e|--requirement|--constraint|--editable|\.{0,2}/|\.\s*$|file:)", re.MULTILINE)
"""A line of a list of packages that names other files."""


@dataclass(frozen=True)
class Parcel:
    """A tar file, and the beginning of its hash."""

    content: bytes
    name: str

    @property
    def compressed(self) -> bytes:
        return gzip.compress(self.content, 3, mtime=0)


def pack(files: Iterable[tuple[str, Path]]) -> Parcel:
    """A tar of files and links by the names that they get. Equal files give equal tars."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in sorted(files):
            entry = tarfile.TarInfo(name)
            facts = path.lstat()
            entry.mode = facts.st_mode & 0o777
            if path.is_symlink():
                entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
                tar.addfile(entry)
            else:
                entry.size = facts.st_size
                with path.open("rb") as file:
                    tar.addfile(entry, file)
    content = stream.getvalue()
    return Parcel(content, hashlib.sha256(content).hexdigest()[:16])


def pack_folder(folder: Path) -> Parcel:
    """All files and links below a folder."""
    found = [Path(place, name) for place, folders, names in os.walk(folder) for name in (*folders, *names)]
    return pack((str(path.relative_to(folder)), path) for path in found if path.is_symlink() or path.is_file())


@cache
def pack_muster() -> Parcel:
    """Our own package, with its templates and the metadata by which submitit finds its environment."""
    roots = [PACKAGE] + [folder for name in TEMPLATES if (folder := PACKAGE.parent / name).is_dir() and _in_sources()]
    found = [path for root in roots for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files = [(str(path.relative_to(PACKAGE.parent)), path) for path in (*found, PACKAGE.parent / "muster.py")]
    about = metadata.distribution("muster-train")
    for path in about.files or ():
        if path.name in ("METADATA", "entry_points.txt") and path.parent.name.endswith(".dist-info"):
            files.append((f"{path.parent.name}/{path.name}", Path(str(about.locate_file(path)))))
    return pack((name, path) for name, path in files if path.is_file())


def _in_sources() -> bool:
    """Whether we run from a checkout, where the templates lie beside the package."""
    return not (PACKAGE / "templates").is_dir()


def requirements(code: Path, launch_only: bool) -> dict[str, str]:
    """The files from which an environment is made: ours with hashes; torch, and what the project lists, without.

    Raises JobError: the project's list names files that are not sent.
    """
    folder = PACKAGE.parent if _in_sources() else PACKAGE / "templates"
    parts = re.split(r"\n(?=\S)", (folder / "docker" / "lock.txt").read_text())
    named = {part: re.sub("[-_.]+", "-", re.match(r"[\w.-]*", part)[0]).lower() for part in parts}  # type: ignore[index]
    locked = [part for part, name in named.items() if name and name not in TOOLS]
    if launch_only:
        return {"locked.txt": "\n".join(part for part in locked if named[part] in LAUNCH_ONLY) + "\n", "others.txt": ""}
    others = [f"torch=={metadata.version('torch').partition('+')[0]}"]
    if (code / LISTS).is_file():
        text = (code / LISTS).read_text()
        if found := OF_FILES.search(text):
            problem = f"{LISTS} names files, which pip does not find over there"
            raise JobError("python", None, problem, "Set `python` to an interpreter that has them: " + found[0].strip())
        others.append(text)
    return {"locked.txt": "\n".join(locked) + "\n", "others.txt": "\n".join(others) + "\n"}


def environment_name(wanted: dict[str, str]) -> str:
    """The folder of the environment that is made from such files."""
    return "python-" + hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
