"""Which files of a folder are code: those that git does not ignore; without git, what does not look like data.

What looks like a secret by its name stays behind, whatever git says.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from trainer.errors import JobError, some_of
from trainer.launch.patterns import all_files, chosen

DATA = re.compile(
    r"\.(jpe?g|png|gif|bmp|tiff?|webp|npy|npz|pth?|ckpt|safetensors|onnx|bin|h5|hdf5|parquet|arrow|feather|tfrecord|mdb|db|"
    r"sqlite3?|mp[34]|avi|mkv|wav|flac|ogg|nii|dcm|zip|tar|gz|bz2|xz|zst|7z|pkl|pickle|pdf|log)",
    re.IGNORECASE,
)
"""Suffixes of what is not copied without git."""
SECRET = re.compile(
    r"(.*/)?(\.env(\.(?!example|sample|template|dist)[^/]*)?|[^/]+\.(pem|key|p12|pfx|jks|keystore|kdbx)|"
    r"id_(rsa|dsa|ecdsa|ed25519)[^/]*|[._]netrc|\.git-credentials|\.pypirc|\.pgpass|\.htpasswd|kubeconfig|"
    r"(credentials|secrets?\.)(?![^/]*\.pyi?$|pyi?$)[^/]*|\.docker/config\.json|\.(aws|ssh|gnupg|kube)(/.*)?)",
    re.IGNORECASE,
)
"""Paths of what is never copied."""
LARGE, MANY = 1 << 20, 1000
"""Bytes of a file, and files of a folder, from which on it is data."""


def list_files(
    source: Path, skip: Callable[[Path], bool], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The names of files and of links to folders, and notes on what is left out. `skip`: folders that are not code.

    `include` and `exclude` are patterns for more files and for fewer. Raises JobError: git refuses, or a pattern
    matches nothing.
    """
    names, data = _list_all(source, skip)
    if include:
        everything = [*all_files(source, skip)]
        wanted = {name for pattern in include for name in chosen("snapshot.include", pattern, everything)}
        names, data = sorted({*names, *wanted}), [name for name in data if name not in wanted]
    dropped = {name for pattern in exclude for name in chosen("snapshot.exclude", pattern, names)}
    names = [name for name in names if name not in dropped]
    left_out = [_left_out(source, data)] if data else []
    secrets = [name for name in names if SECRET.fullmatch(name)]
    if secrets:
        remedy = "If the code needs one, give its absolute path, which the nodes must see; if it is none, rename it"
        left_out.append(f"not copied for the nodes, as by its name it is a secret: {some_of(secrets)}. {remedy}")
    return [name for name in names if name not in secrets], left_out


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files, read-only, and with no more rights for anybody than they have. Raises JobError: one is unreadable."""
    for name in names:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source / name, copy)
        except OSError as error:
            remedy = "Make it readable, or ignore it in git"
            raise JobError("code", name, f"cannot be copied: {error}", remedy) from None
        copy.chmod((source / name).stat().st_mode & 0o555)


def _list_all(source: Path, skip: Callable[[Path], bool]) -> tuple[list[str], list[str]]:
    """What is code, and what looks like data."""
    names = _ask_git(source)
    if names is not None:
        return sorted(name for name in names if not skip((source / name).parent)), []
    found: dict[bool, list[str]] = {True: [], False: []}
    for path, is_code in _walk(source, skip):
        found[is_code].append(str(path.relative_to(source)))
    return sorted(found[True]), found[False]


def _left_out(source: Path, names: list[str]) -> str:
    what = f"{len(names)} files, such as {min(names)}, are" if len(names) > 1 else f"{names[0]} is"
    remedy = "Name what the code needs in snapshot.include; in git, everything is copied that .gitignore does not list"
    return f"{what} not copied for the nodes: {source} is not in git, so what looks like data stays here. {remedy}"


def _ask_git(source: Path) -> set[str] | None:
    """What git tracks or does not ignore, in submodules and nested clones too; None outside of a repository.

    Raises JobError: git refuses.
    """
    argv = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    of_hooks = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # git sets them when it starts us
    own = {name: value for name, value in os.environ.items() if name not in of_hooks}
    try:
        done = subprocess.run(argv, capture_output=True, env={**own, "LC_ALL": "C"})
    except OSError:  # there is no git
        return None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        if "not a git repository" in said:
            return None
        remedy = f"Do what it says; of an owner: git config --global --add safe.directory {source}"
        raise JobError("code", str(source), f"git does not list its files: {said}", remedy)
    names = set()
    for name in map(os.fsdecode, done.stdout.split(b"\0")):
        path = source / name
        if path.is_file() or (path.is_dir() and path.is_symlink()):
            names.add(name)
        elif name and path.is_dir():  # a submodule, or a clone inside of this one, which git names alone
            inner = _ask_git(path) if (path / ".git").exists() else None
            names |= {os.path.join(name, each) for each in inner or ()}
    return names


def _walk(source: Path, skip: Callable[[Path], bool]) -> Iterator[tuple[Path, bool]]:
    """Files and links to folders, each with whether it is code; without hidden ones, caches, Python environments."""
    for folder, folders, files in os.walk(source):
        here = Path(folder)
        yield from ((here / name, True) for name in folders if name[0] != "." and (here / name).is_symlink())
        folders[:] = [name for name in folders if not _is_no_code(here / name) and not skip(here / name)]
        for path in (here / name for name in files if name[0] != "."):
            if path.is_file():
                is_small = len(files) <= MANY and path.stat().st_size <= LARGE
                yield path, is_small and DATA.fullmatch(path.suffix) is None


def _is_no_code(folder: Path) -> bool:
    environment = any((folder / name).exists() for name in ("pyvenv.cfg", "conda-meta"))
    return environment or folder.name[0] == "." or folder.name in ("__pycache__", "node_modules")
