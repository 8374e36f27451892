"""Trees as tars that leave this machine: equal trees make equal ones, wherever and whenever they are made."""

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Archive:
    """A tree, packed."""

    tar: bytes

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.tar).hexdigest()

    @cached_property
    def packed(self) -> bytes:
        return gzip.compress(self.tar, 6, mtime=0)


def tar(files: Iterable[tuple[str, Path]]) -> bytes:
    """Files and links by the names that they get, with content, target, and whether they may be run."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, path in sorted(files):
            entry, facts = tarfile.TarInfo(name), path.lstat()
            if path.is_symlink():
                entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
                archive.addfile(entry)
                continue
            entry.size, entry.mode = facts.st_size, 0o555 if facts.st_mode & 0o111 else 0o444
            with path.open("rb") as file:
                archive.addfile(entry, file)
    return stream.getvalue()


def tar_folder(folder: Path) -> bytes:
    """All files and links below a folder."""
    found = [Path(place, name) for place, folders, names in os.walk(folder) for name in (*folders, *names)]
    return tar((str(path.relative_to(folder)), path) for path in found if path.is_symlink() or path.is_file())
