"""Checkpoints: committed whole or not at all, verified before they are believed.

A checkpoint is a folder `step-<n>` with `model.pt` (the plain state dict of the unwrapped model), `state.pt`
(optimizer, scaler, average, buffers, position) and `manifest.json`, which is written last and holds the sha256 of the
others. It becomes visible by one rename. What is saved, and when, is decided in `trainer.training.loop`.
"""

import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import get_crc32_options, set_crc32_options, set_default_mmap_options

from trainer import __version__
from trainer.run.attempts import check_current
from trainer.run.folder import RunFolder, committed

PAYLOAD = ("model.pt", "state.pt")
UNFINISHED = re.compile(r"\.(pending|replaced|pruned)-(step-[0-9]{9,})(-[0-9]+)?")
"""The names of our own folders that are no checkpoints yet, or any more."""


class DamagedCheckpoint(RuntimeError):
    """A checkpoint's files are not those of its manifest."""


def commit(
    root: Path, step: int, payload: dict[str, Any], facts: dict[str, Any], attempt: int,
    owner: Callable[[], int] | None = None,
) -> Path:  # fmt: skip
    """Write `payload` (file name to object) and its manifest; return `root/step-<step>`, which is visible now.

    `owner`: tells, in the end, which attempt must own the run; default: `attempt`. Raises OSError, StaleAttempt (a
    later one owns it): nothing became visible, what was there is untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    pending = root / f".pending-step-{step:09d}-{os.getpid()}"
    shutil.rmtree(pending, ignore_errors=True)
    try:
        pending.mkdir()
        files = {name: _write(pending / name, value) for name, value in payload.items()}
        manifest = {
            "format": 1, "step": step, "attempt": attempt, "saved_at": time.time(), "muster": __version__,
            "torch": torch.__version__, **facts, "files": files,
        }  # fmt: skip
        with _new_file(pending / "manifest.json") as file:
            file.write((json.dumps(manifest, indent=1) + "\n").encode())
        _sync_folder(pending)
        check_current(RunFolder(root.parent), attempt, owner)
        target = root / f"step-{step:09d}"
        if target.is_dir() and not target.is_symlink():  # the same step again, after a resume from before it
            target.rename(root / f".replaced-{target.name}-{time.time_ns()}")
        elif os.path.lexists(target):  # whose it is, nobody knows
            target.rename(root / f"other-{target.name}-{time.time_ns()}")
        pending.rename(target)
        _sync_folder(root)
    except BaseException:
        shutil.rmtree(pending, ignore_errors=True)
        _put_back(root)
        raise
    return target


def prune(root: Path, keep_last: int, best: str | None) -> None:
    """Remove what is neither among the newest `keep_last` nor named `best`; call only after a commit."""
    ours = [folder for folder in committed(root) if not folder.is_symlink()]
    for folder in ours[keep_last:]:
        if folder.name != best:
            doomed = root / f".pruned-{folder.name}"
            folder.rename(doomed)  # a half-removed folder must not look like a damaged checkpoint
            shutil.rmtree(doomed, ignore_errors=True)
    _remove(root, "replaced")


def sweep(root: Path) -> None:
    """Tidy up after a killed save or prune; only the rank that saves may call it, before it reads and saves."""
    _put_back(root)
    _remove(root, "pending")
    _remove(root, "pruned")


def _unfinished(root: Path, kind: str) -> list[tuple[Path, str]]:
    """Our own folders of one kind, the newest first, and the names that they had or would have had."""
    named = [(path, UNFINISHED.fullmatch(path.name)) for path in sorted(root.glob(f".{kind}-*"), reverse=True)]
    return [(path, match[2]) for path, match in named if match is not None]


def _remove(root: Path, kind: str) -> None:
    for stale, _ in _unfinished(root, kind):
        shutil.rmtree(stale, ignore_errors=True)


def _put_back(root: Path) -> None:
    """Give a checkpoint its name again whose replacement did not come."""
    for stale, name in _unfinished(root, "replaced"):
        if not os.path.lexists(root / name):
            stale.rename(root / name)


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises DamagedCheckpoint: naming file and difference."""
    for path, facts in _files_of(folder).items():
        _compare(path, facts)


def read(folder: Path, beat: Callable[[], None]) -> list[Any]:
    """What a checkpoint holds, in the order of `PAYLOAD`, without running any code that it may hold.

    Each file is read from the disk once, into memory, where its tensors stay: what was verified is what is used.
    `beat`: signs of life. Raises DamagedCheckpoint: as `verify`.
    """
    found: dict[str, Any] = {}
    for path, facts in _files_of(folder).items():
        with open(os.memfd_create("muster-checkpoint"), "wb") as copy:
            _compare(path, facts, copy, beat)
            copy.flush()
            if path.name in PAYLOAD:
                with set_default_mmap_options(mmap.MAP_SHARED):  # or what changes would be there twice
                    file = f"/proc/self/fd/{copy.fileno()}"
                    found[path.name] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return [found[name] for name in PAYLOAD]


def _files_of(folder: Path) -> dict[Path, tuple[int, str]]:
    """The files of a checkpoint, and how many bytes and which sha256 they have by its manifest."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        found = {folder / name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = {}
    if {folder / name for name in PAYLOAD} - set(found):
        raise DamagedCheckpoint(f"{folder}: manifest.json is missing or unreadable")
    return found


def _compare(
    path: Path, facts: tuple[int, str], copy: BinaryIO | None = None, beat: Callable[[], None] = lambda: None
) -> None:
    """Compare a file with what the manifest says of it; `copy` gets what is read."""
    if not path.is_file():
        raise DamagedCheckpoint(f"{path}: is missing")
    expected, name = facts
    size = path.stat().st_size
    if size != expected:
        raise DamagedCheckpoint(f"{path}: has {size} bytes instead of {expected}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            beat()
            digest.update(block)
            if copy is not None:
                copy.write(block)
    if digest.hexdigest() != name:
        raise DamagedCheckpoint(f"{path}: its sha256 is not the manifest's: bits have changed")


def newest_good(root: Path, look: Callable[[Path], object] = verify) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and the folders of newer ones with what is wrong with them.

    `look` verifies one. Raises DamagedCheckpoint: there are checkpoints and none is whole: starting over silently would
    lose work.
    """
    refused: dict[Path, str] = {}
    for folder in committed(root):
        try:
            look(folder)
            return folder, refused
        except DamagedCheckpoint as error:
            refused[folder] = str(error)
    if refused:
        raise DamagedCheckpoint("every checkpoint is damaged: " + "; ".join(refused.values()))
    return None, refused


class Hashing:
    """A file that hashes what is written: torch.save's zip writer seeks nowhere, so one pass is enough."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.flush = file, hashlib.sha256(), file.flush

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.file.write(view)
        return len(view)


def dump(value: Any, file: BinaryIO) -> bytes:
    """Write what torch.load reads, without zip's own checksums, which would block all threads; return its sha256."""
    hashing, before = Hashing(file), get_crc32_options()
    set_crc32_options(False)
    try:
        torch.save(value, hashing)  # type: ignore[arg-type]
    finally:
        set_crc32_options(before)
    return hashing.digest.digest()


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is on the disk when it is closed."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, value: Any) -> dict[str, Any]:
    with _new_file(path) as file:
        digest = dump(value, file)
        return {"bytes": file.tell(), "sha256": digest.hex()}


def _sync_folder(path: Path) -> None:
    """Have a folder's names on the disk, where the file system can do that for folders; mounts of others refuse."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
    finally:
        os.close(handle)
