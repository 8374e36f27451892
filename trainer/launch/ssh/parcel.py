"""What is sent to another machine: Muster itself, and the user's code.

A parcel is named by its content, so equal ones are sent once.
"""

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import trainer

PACKAGE = Path(trainer.__file__).resolve().parent
TEMPLATES = ("docker", "jobs", "k8s", "slurm")


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
