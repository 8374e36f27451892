"""The records of a run that is on another machine, copied into its folder here as they grow.

`collect` runs over there, `apply` here. What was copied is never copied again, and two processes may do it at once.
"""

import base64
import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import JobError
from trainer.launch.local.gpu_lease import try_lock
from trainer.run.event_files import own_file
from trainer.run.folder import RunFolder
from trainer.run.log_tail import size

GROWING = ("events/*.jsonl", "metrics.jsonl", "logs/node-*.log", "logs/slurm-*.out", "logs/supervisor.log")
OF_RANKS = ("logs/rank-*.log", "logs/ranks-*/rank-*.log")
REPLACED = ("evaluation.json", "result.json", "failure.json", "exit.json")
NAME = re.compile(
    r"(events/[\w.-]+\.jsonl|metrics\.jsonl|logs/(ranks-\d+/)?\w[\w.-]*|(evaluation|result|failure|exit)\.json)"
)
"""What a file may be called that is written here because another machine says so: none that decides what is done."""
LOCK = "ssh.lock"
"""In the folder of the plan: held while a submission is under way."""
NEVER = "its submission was cut off before the job was handed over; `muster submit RUN` completes it"
"""What is said of a run that has no handle over there."""
PART = 4 << 20
"""Bytes that come with one answer."""


def collect(run: RunFolder, have: dict[str, int], logs: bool) -> dict[str, Any]:
    """What is new: `have` is how long each growing file is at the other side, or the checksum of a replaced one.

    `logs`: also of ranks.
    """
    files: dict[str, Any] = {}
    left = PART
    more = False
    for name in _names(run, (*REPLACED, *GROWING, *(OF_RANKS if logs else ()))):
        begin = 0 if name in REPLACED else have.get(name, 0)
        if name not in REPLACED and size(run.path / name) == begin:
            continue
        with contextlib.suppress(OSError), (run.path / name).open("rb") as file:
            file.seek(begin if begin <= size(run.path / name) else 0)
            begin = file.tell()
            new = file.read(left)
            more |= len(new) == left
            left -= len(new)
            if name not in REPLACED or zlib.crc32(new) != have.get(name):
                data = base64.b64encode(zlib.compress(new, 1)).decode()
                files[name] = {"begin": begin, "data": data, "changed_ns": os.fstat(file.fileno()).st_mtime_ns}
        if not left:
            break
    gone = [name for name in have if name in REPLACED and not (run.path / name).exists()]
    return {"files": files, "gone": gone, "more": more}


def have(run: RunFolder, logs: bool) -> dict[str, int]:
    """What is here already, as `collect` asks for it."""
    found = {}
    for name in _names(run, (*GROWING, *(OF_RANKS if logs else ()))):
        if run.path / name != own_file(run.events):
            found[name.replace(HERE, "")] = size(run.path / name)
    for name in REPLACED:
        with contextlib.suppress(OSError):
            found[name] = zlib.crc32((run.path / name).read_bytes())
    return found


HERE = ".there"
"""In the name of a copy whose own name is taken, because the other machine is this one."""


def apply(run: RunFolder, answer: dict[str, Any]) -> None:
    """Write what `collect` found. Raises JobError: the other side names a file that is none of a run."""
    for name, part in answer["files"].items():
        if not NAME.fullmatch(name):
            raise JobError("ssh", name, "is not a file of a run", "Look at the machine that says so")
        path = run.path / name
        if path == own_file(run.events):
            path = path.with_name(f"{path.stem}{HERE}.jsonl")
        data = zlib.decompressobj().decompress(base64.b64decode(part["data"]), PART)
        path.parent.mkdir(exist_ok=True)
        if name in REPLACED:
            pending = path.with_name(f".{path.name}.{os.getpid()}")
            pending.write_bytes(data)
            os.utime(pending, ns=(part["changed_ns"],) * 2)
            pending.replace(path)
            continue
        if not 0 <= part["begin"] <= size(path):  # it was made anew meanwhile, and is asked for again
            continue
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0) as file:
            if part["begin"] == 0 and size(path):
                file.truncate(0)  # it was made anew over there
            os.pwrite(file.fileno(), data, part["begin"])
        os.utime(path, ns=(part["changed_ns"],) * 2)  # whoever compares with that of over there sees that it is equal
    for name in answer["gone"]:
        if name in REPLACED:
            (run.path / name).unlink(missing_ok=True)


def run_of(path: str) -> RunFolder:
    """A run by its path, in which `~` and `$NAME` are those of this machine."""
    return RunFolder(Path(os.path.expandvars(os.path.expanduser(path))).resolve())


def is_under_way(run: RunFolder) -> bool:
    """Whether a process submits it now."""
    with contextlib.suppress(OSError), (run.plan / LOCK).open("r+") as file:
        return try_lock(file.fileno()) is False
    return False


def _names(run: RunFolder, patterns: tuple[str, ...]) -> Iterator[str]:
    for pattern in patterns:
        yield from sorted(str(path.relative_to(run.path)) for path in run.path.glob(pattern))
