"""One hash for a folder of files, wherever it lies: of the code of a run, and of what an image is made of."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def tree_hash(folder: Path) -> str:
    """The hash of everything in a folder."""
    found = [os.path.join(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files)]
    return hash_files(folder, (os.path.relpath(path, folder) for path in found))


def hash_files(folder: Path, names: Iterable[str]) -> str:
    """The hash of some: of their names, of what they hold, of who may execute them, and of where links lead.

    Folders count by what is in them. Other permissions do not count: in a container the same files may have others.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        path = folder / name
        if path.is_symlink():
            kind, content = b"link", os.fsencode(os.readlink(path))
        elif path.is_dir():
            continue
        else:
            kind = b"program" if path.stat().st_mode & 0o111 else b"file"
            content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(b"%s\0%s\0%d\0%s" % (os.fsencode(name), kind, len(content), content))
    return digest.hexdigest()
