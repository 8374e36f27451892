"""`muster pull`: what a run wrote elsewhere, brought into its run folder here. Whole files, each compared by its hash.

What comes is first written below `.pull` in the run folder, and gets its name when it is whole: a transfer that was cut
off goes on there. The other side may say anything: only names of a run folder are taken, and no link here is followed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.load import read_sections
from trainer.errors import JobError, wrong_choice
from trainer.launch.far_folder import CutOff, FarFolder, Talk
from trainer.launch.handle import read_handle
from trainer.launch.platform import platform_of
from trainer.records import NOT_OURS, is_count, is_number, read_json, read_lines
from trainer.run.folder import CHECKPOINT, RunFolder, step_of
from trainer.run.named import find_run
from trainer.run.ownership import check_owner

WHICH = ("best", "last", "all")
PART = r"[^/.\0][^/\0]*"
"""A word of a path: nothing hidden, no way up."""
RESULTS = re.compile(
    rf"(evaluation|result|failure)\.json|(metrics|events|samples-rank\d+)\.jsonl|events/{PART}\.jsonl|"
    rf"(failures|logs|profile|tensorboard)(/{PART})+"
)
"""What a run writes, its checkpoints apart. What it was made from, its secret, and how it ended are known here."""
OF_CHECKPOINT = re.compile(rf"checkpoints/({CHECKPOINT.pattern})/{PART}")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class File:
    """A file on the other side."""

    name: str
    size: int
    mtime_ns: int
    sha256: str = ""
    """Of what arrived."""


@dataclass
class Brought:
    """What a pull did."""

    files: list[File]
    kept: list[str]
    """What is newer here, and stayed."""
    notes: list[str]


def pull(run_path: str, which: str | None) -> str:
    """Bring results, and checkpoints if told; return what to tell. Raises JobError: it was cut off, or the like."""
    if which is not None and which not in WHICH:
        raise wrong_choice("--checkpoints", which, WHICH)
    run = find_run(run_path)
    check_owner(run)
    handle = read_handle(run)
    if handle is None:
        raise JobError("RUN", str(run), "was not submitted by muster", "There is no other place to bring it from")
    with platform_of(handle).reach(run, handle) as there:
        try:
            with _alone(run):
                return _tell(run, _bring(run, there, which))
        except OSError as error:
            raise JobError("RUN", str(run), f"cannot be written: {error}", "Correct that, and pull again") from None


@contextmanager
def _alone(run: RunFolder) -> Iterator[None]:
    """Two at a time would write into one file."""
    run.pull.mkdir(exist_ok=True)
    with (run.pull / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JobError("RUN", str(run), "is being pulled already", "Wait for that to end") from None
        yield
    if not any(path.is_file() and path.name != ".lock" for path in run.pull.rglob("*")):
        shutil.rmtree(run.pull, ignore_errors=True)


def _bring(run: RunFolder, there: FarFolder, which: str | None) -> Brought:
    found = _list(there)
    done = Brought([], [], [])
    results = [file for file in found if RESULTS.fullmatch(file.name)]
    for file in _fetch(run, there, [file for file in results if _is_wanted(run, file, done)], done):
        _place(run, file)
        done.files.append(file)
    steps: dict[str, list[File]] = {}
    for file in found:
        if match := OF_CHECKPOINT.fullmatch(file.name):
            steps.setdefault(match[1], []).append(file)
    whole = {step: files for step, files in steps.items() if any(file.name.endswith(MANIFEST) for file in files)}
    for step in _choose(run, sorted(whole, key=lambda step: step_of(Path(step))), which):
        if not (run.checkpoints / step).exists():
            _bring_checkpoint(run, there, whole[step], step, done)
    if which is None and whole:
        size = sum(file.size for files in whole.values() for file in files)
        done.notes.append(f"{len(whole)} checkpoints ({_amount(size)}) stay there: --checkpoints best, last or all")
    return done


def _list(there: FarFolder) -> list[File]:
    """What is there, less what is not named as files of a run are."""
    files = []
    with there.start("list") as talk:
        while "end" not in (line := _checked(talk)):
            name, size, date = line.get("name"), line.get("size"), line.get("mtime_ns")
            if isinstance(name, str) and is_count(size) and is_count(date):
                files.append(File(name, size, date))
    return files


def _checked(talk: Talk) -> dict[str, Any]:
    line = talk.line()
    if "error" in line and "name" not in line:
        raise JobError("RUN", talk.what, f"cannot be read there: {line['error']}", "See who may read it, and try again")
    return line


def _is_wanted(run: RunFolder, file: File, done: Brought) -> bool:
    """Whether it is not here, or an older one is, or one that may be the beginning of it."""
    here = run.path / file.name
    if not _is_inside(run, here):
        done.notes.append(f"{file.name} is not brought: it, or a folder of it here, is a link")
        return False
    if not here.exists():
        return True
    facts = here.stat()
    if facts.st_size > file.size and _is_newer(here, file):
        done.kept.append(file.name)
        return False
    return facts.st_size != file.size or facts.st_mtime_ns < file.mtime_ns


def _is_newer(here: Path, file: File) -> bool:
    return here.exists() and here.stat().st_mtime_ns > file.mtime_ns


def _is_inside(run: RunFolder, path: Path) -> bool:
    """Whether no part of it below the run folder is a link."""
    parts = [path, *path.parents]
    return not any(part.is_symlink() for part in parts[: parts.index(run.path)])


def _fetch(run: RunFolder, there: FarFolder, files: list[File], done: Brought, again: bool = True) -> Iterator[File]:
    """Bring files below `.pull`, one after the other; those that are whole there. Raises CutOff."""
    if not files:
        return
    wrong = []
    with there.start("read") as talk:
        talk.send(b"".join(json.dumps([file.name, _begin(run, file)]).encode() + b"\n" for file in files) + b"\n")
        for file in files:
            line = _checked(talk)
            if "error" in line:  # it was removed meanwhile, as old checkpoints are
                done.notes.append(f"{file.name} cannot be read there any more: {line['error']}")
                continue
            pending, (begin, size, date) = run.pull / file.name, map(line.get, ("offset", "size", "mtime_ns"))
            if not (is_count(begin) and is_count(size) and is_count(date) and begin <= min(size, _size(pending))):
                raise CutOff(talk.what, f"{line!r} is not an answer")
            digest = _write(pending, talk, begin, size)
            if digest == _checked(talk).get("sha256"):
                os.utime(pending, ns=(date, date))
                yield File(file.name, size, date, digest)
            elif _is_newer(run.path / file.name, file):
                pending.unlink()
                done.kept.append(file.name)
            else:  # what was here already is not the beginning of what is there
                pending.write_bytes(b"")
                wrong.append(file)
    if wrong and not again:
        raise CutOff(there.folder, f"{wrong[0].name} changed while it was read")
    yield from _fetch(run, there, wrong, done, again=False)


def _begin(run: RunFolder, file: File) -> int:
    """How much of it is below `.pull` already. Logs grow: what is here may be the beginning of what is there."""
    pending, here = run.pull / file.name, run.path / file.name
    if not _is_inside(run, pending):
        raise JobError("RUN", str(run), f"{pending} is, or lies in, a link", "Remove it")
    pending.parent.mkdir(parents=True, exist_ok=True)
    if not pending.exists() and here.exists() and here.stat().st_size <= file.size:
        shutil.copyfile(here, pending)
    return _size(pending)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write(pending: Path, talk: Talk, offset: int, size: int) -> str:
    """Write what comes behind what is there; return the sha256 of all."""
    digest = hashlib.sha256()
    with pending.open("r+b" if pending.exists() else "x+b") as file:
        file.truncate(offset)
        while block := file.read(1 << 20):
            digest.update(block)
        for block in talk.read(size - offset):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def _place(run: RunFolder, file: File) -> None:
    target = run.path / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    (run.pull / file.name).replace(target)


def _choose(run: RunFolder, steps: list[str], which: str | None) -> list[str]:
    """The checkpoints that are asked for. Raises JobError: nobody knows which is best."""
    if which is None or not steps:
        return []
    if which == "last":
        return steps[-1:]
    if which == "all":
        return steps
    checkpoint = read_sections(run.job).get("checkpoint") or {}
    name, lowest = str(checkpoint.get("best")), checkpoint.get("best_mode") == "min"
    lines = [line for line in read_lines(run.metrics) if line.get("kind") == "evaluation" and is_number(line.get(name))]
    values = {line["step"]: line[name] for line in lines if is_count(line.get("step"))}
    known = {step: values[at] for step in steps if (at := step_of(Path(step))) in values}
    if not known:
        problem = f"none of the checkpoints there has a value of checkpoint.best={name}"
        raise JobError("--checkpoints", which, problem, "Choose last or all")
    return [(min if lowest else max)(known, key=known.__getitem__)]


def _bring_checkpoint(run: RunFolder, there: FarFolder, files: list[File], step: str, done: Brought) -> None:
    """Bring one, compare its files with its manifest, and give it its name."""
    pending = run.pull / "checkpoints" / step
    hashes = {Path(file.name).name: file.sha256 for file in _fetch(run, there, files, done)}
    if len(hashes) < len(files):  # it was removed there meanwhile
        shutil.rmtree(pending, ignore_errors=True)
        return
    try:
        wanted = {name: facts["sha256"] for name, facts in (read_json(pending / MANIFEST) or {})["files"].items()}
    except NOT_OURS:
        wanted = {MANIFEST: "readable"}
    for name in wanted:
        if hashes.get(name) != wanted[name]:
            shutil.rmtree(pending)
            problem = f"is damaged there: {name} is not what its manifest says"
            raise JobError("--checkpoints", step, problem, "Choose another one")
    run.checkpoints.mkdir(exist_ok=True)
    pending.rename(run.checkpoints / step)
    done.files += files


def _tell(run: RunFolder, done: Brought) -> str:
    """What was brought, by folder."""
    groups: dict[str, list[File]] = {}
    for file in done.files:
        depth = 2 if file.name.startswith("checkpoints/") else 1
        groups.setdefault("/".join(file.name.split("/")[:depth]), []).append(file)
    lines = [
        f"{name}  {len(files)} files  {_amount(sum(file.size for file in files))}" for name, files in groups.items()
    ]
    if done.kept:
        lines.append(f"newer here, so not brought: {', '.join(done.kept)}")
    return "\n".join([*(lines or ["nothing new"]), *done.notes, f"run folder: {run}"])


def _amount(size: int) -> str:
    return f"{size / 2**20:.1f} MB" if size >= 1 << 20 else f"{size / 2**10:.1f} kB"
