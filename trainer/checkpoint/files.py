"""Checkpoints: committed whole or not at all, verified before they are believed.

A checkpoint is a folder `step-<n>` with `model.pt` (the plain state dict of the unwrapped model), `state.pt`
(optimizer, scaler, average, buffers, position) and `manifest.json`, which is written last and holds the sha256 of the
others. A sharded training's has shards, and all else in `state.pt` (`trainer.checkpoint.sharded`). It becomes visible
by one rename. What is saved, and when, is decided in `trainer.training.loop`.
"""

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import set_default_mmap_options

from trainer.checkpoint.durable import dump, new_file, write_hashed
from trainer.checkpoint.sharded import STATE, Meeting, Shards, read_state, shard_name, take_out, write_shard
from trainer.records import sync_folder
from trainer.run.attempts import check_current
from trainer.run.folder import RunFolder, committed
from trainer.version import __version__

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
    pending = root / pending_name(step, os.getpid())
    shutil.rmtree(pending, ignore_errors=True)
    try:
        pending.mkdir()
        files = {name: write_hashed(pending / name, partial(dump, value)) for name, value in payload.items()}
        return _publish(root, pending, step, {"format": 1, **facts, "files": files}, attempt, owner)
    except BaseException:
        shutil.rmtree(pending, ignore_errors=True)
        _put_back(root)
        raise


def commit_part(
    root: Path, step: int, number: int, shard: tuple[int, int], contents: dict[str, Any], facts: dict[str, Any],
    attempt: int, owner: Callable[[], int] | None, is_alone: Callable[[], bool], limit_s: float = math.inf,
) -> Path | None:  # fmt: skip
    """Write one shard, and, if it is the first, commit the checkpoint when all are there: then its folder.

    `number` tells the checkpoints of all times apart; `shard`: which of how many; `is_alone`, `limit_s`: see
    `Meeting.collect`. Raises as `commit`.
    """
    index, count = shard
    pending = root / pending_name(step, number)
    meeting = Meeting(pending, index, count)
    try:
        rest, parts = take_out(contents, count)
        files = {(name := shard_name(index, count)): write_hashed(pending / name, partial(write_shard, parts))}
        if not index:
            files[STATE] = write_hashed(pending / STATE, partial(dump, rest))
        sync_folder(pending)
        meeting.note(files)
        if index:
            return None
        files = meeting.collect(is_alone, limit_s)
        return _publish(root, pending, step, {"format": 2, **facts, "shards": count, "files": files}, attempt, owner)
    except BaseException as error:
        if index and not pending.exists():  # whoever writes the first one has given up, and says why
            return None
        meeting.fail(error)
        if not index:
            remove_pending(root, number + 1)  # with what late writers left of those that failed before
            _put_back(root)
        raise


def pending_name(step: int, number: int) -> str:
    """The folder of a checkpoint that is being written."""
    return f".pending-step-{step:09d}-{number}"


def _publish(
    root: Path, pending: Path, step: int, facts: dict[str, Any], attempt: int, owner: Callable[[], int] | None
) -> Path:
    """Make what was written a checkpoint."""
    manifest = {
        "step": step, "attempt": attempt, "saved_at": time.time(), "muster": __version__, "torch": torch.__version__,
        **facts,
    }  # fmt: skip
    with new_file(pending / "manifest.json") as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode())
    sync_folder(pending)
    check_current(RunFolder(root.parent), attempt, owner)
    target = root / f"step-{step:09d}"
    if target.is_dir() and not target.is_symlink():  # the same step again, after a resume from before it
        target.rename(root / f".replaced-{target.name}-{time.time_ns()}")
    elif os.path.lexists(target):  # whose it is, nobody knows
        target.rename(root / f"other-{target.name}-{time.time_ns()}")
    pending.rename(target)
    sync_folder(root)
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


def sweep(root: Path, below: float = math.inf) -> None:
    """Tidy up after a killed save or prune; only the rank that saves may call it, before it reads and saves.

    `below`: see `remove_pending`.
    """
    _put_back(root)
    remove_pending(root, below)
    _remove(root, "pruned")


def remove_pending(root: Path, below: float) -> None:
    """Remove what was begun, but no checkpoint that has this number (`below`) or a later one.

    Others may be writing their shards of those already: they do not wait for who writes the first one.
    """
    for stale, _ in _unfinished(root, "pending"):
        if int(stale.name.rpartition("-")[2]) < below:
            shutil.rmtree(stale, ignore_errors=True)


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
    verify_share(folder, 0, 1, lambda: None)


def verify_share(folder: Path, rank: int, world_size: int, beat: Callable[[], None]) -> None:
    """Compare a rank's share of the files with the manifest. Raises DamagedCheckpoint: as `verify`."""
    for path, facts in list(_files_of(folder).items())[rank::world_size]:
        _compare(path, facts, beat)


def read_share(folder: Path, shard: tuple[int, int]) -> list[Any]:
    """What a checkpoint holds for one of several ranks, in the order of `PAYLOAD`; all files were verified.

    Of shards its parts of the tensors are read; whole tensors stay in the pages of the file, read when looked at.
    """
    if not is_sharded(folder):
        return [torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True) for name in PAYLOAD]
    state = Shards(folder).fill(read_state(folder), *shard)
    return [state.pop("model"), state]


def weights_with_markers(folder: Path) -> Any:
    """The weights in a checkpoint that was verified, in the pages of its file; a `Sharded` for what is in shards."""
    if not is_sharded(folder):
        return torch.load(folder / PAYLOAD[0], map_location="cpu", weights_only=True, mmap=True)
    return read_state(folder)["model"]


def read_weights(folder: Path, shard: tuple[int, int]) -> Any:
    """The weights in a checkpoint that was verified; for one of several ranks its parts of what is in shards."""
    return Shards(folder).fill(weights_with_markers(folder), *shard)


def read(folder: Path, beat: Callable[[], None]) -> list[Any]:
    """What a checkpoint holds, in the order of `PAYLOAD`, without running any code that it may hold.

    Each file is read from the disk once, into memory, where its tensors stay: what was verified is what is used. Shards
    are verified, then put together. `beat`: signs of life. Raises DamagedCheckpoint: as `verify`.
    """
    if is_sharded(folder):
        verify_share(folder, 0, 1, beat)
        return read_share(folder, (0, 1))
    found: dict[str, Any] = {}
    for path, facts in _files_of(folder).items():
        with open(os.memfd_create("muster-checkpoint"), "wb") as copy:
            _compare(path, facts, beat, copy)
            copy.flush()
            if path.name in PAYLOAD:
                with set_default_mmap_options(mmap.MAP_SHARED):  # or what changes would be there twice
                    file = f"/proc/self/fd/{copy.fileno()}"
                    found[path.name] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return [found[name] for name in PAYLOAD]


def _files_of(folder: Path) -> dict[Path, tuple[int, str]]:
    """The files of a checkpoint, and how many bytes and which sha256 they have by its manifest."""
    expected: tuple[str, ...] = PAYLOAD
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files, count = manifest["files"], int(manifest.get("shards", 0))
        if count:
            expected = STATE, *(shard_name(index, count) for index in range(count))
        found = {folder / name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = {}
    if {folder / name for name in expected} - set(found):
        raise DamagedCheckpoint(f"{folder}: manifest.json is missing or unreadable")
    return found


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint is that of a sharded training."""
    return any(folder.glob("shard-00000-of-*"))


def _compare(path: Path, facts: tuple[int, str], beat: Callable[[], None], copy: BinaryIO | None = None) -> None:
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
