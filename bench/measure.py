"""What the benches of commands share: start one, read the marks of its ranks, end all of it, sum up, report."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING = Path(__file__).with_name("tiny.py")
SESSION = Path(__file__).with_name("tiny_session.py")
RESULTS = Path(__file__).with_name("results")
BIN = Path(sys.executable).parent
NOISE = 0.10
"""Half the distance between the quartiles, as a share of the median, above which no number is given."""


@dataclass(frozen=True)
class Mark:
    """Something that a rank of the training has done."""

    time: float
    pid: int
    rank: int
    what: str
    step: int


def adopt_orphans() -> None:
    """Make this process the parent of what outlives its own parent, so that it is waited for, and its time counted."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, prctl(2)


def environment(**variables: str) -> dict[str, str]:
    """The same for all: one thread per rank, no variables of a launcher that we may run under."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith(("MUSTER_", "SLURM_", "TORCH"))}
    return {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}


def start(command: Sequence[str | Path], folder: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start a command whose output nobody reads unless it fails: `folder/output.txt`."""
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            list(map(str, command)), cwd=folder, env=environment(**variables), stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def read_marks(path: Path) -> list[Mark]:
    """What the ranks have done so far."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    fields = (line.split() for line in whole.splitlines())
    return [Mark(float(when), int(pid), int(rank), what, int(step)) for when, pid, rank, what, step in fields]


def descendants() -> list[int]:
    """Every process that this one started or adopted, with all that those started."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.name))
    found, queue = [], [os.getpid()]
    while queue:
        below = parents.get(queue.pop(), [])
        found += below
        queue += below
    return found


def wait_all(timeout_s: float) -> None:
    """Wait for all processes of a command to end by themselves, then kill those that do not."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            continue
        if time.monotonic() > end:
            for left in descendants():
                with suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)
        time.sleep(0.01)


def cpu_s() -> float:
    """CPU time of all processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_job(folder: Path, words: Sequence[str], script: Path = TRAINING, **keys: Any) -> Path:
    """A job file for the training as a script."""
    job = {"script": str(script), "script_args": list(words), "device": "cpu", "runs": str(folder / "runs"), **keys}
    path = folder / "tiny.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in job.items()))
    return path


def spread(values: Sequence[float], absolute: bool = False) -> dict[str, Any]:
    """Median, quartiles, largest; `noisy`: too few, or too far apart (`absolute`: by NOISE itself) to say anything."""
    if len(values) < 2:
        low = median = high = values[0]
    else:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    noisy = len(values) < 3 or (high - low) / 2 > NOISE * (1 if absolute else abs(median))
    return {
        "median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)], "largest": round(max(values), 3),
        "noisy": noisy,
    }  # fmt: skip


def show(value: dict[str, Any] | None) -> str:
    """A cell of a table: the median and its quartiles, or only what no round exceeded."""
    if value is None:
        return "-"
    if value["noisy"]:
        return f"noise too high (all <= {value['largest']:.2f})"
    low, high = value["quartiles"]
    return f"{value['median']:.2f} [{low:.2f}, {high:.2f}]"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if index else cell.ljust(width)
                  for index, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )  # fmt: skip


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_results(path: Path, **values: Any) -> None:
    """The rows, with what the numbers depend on."""
    packages = ("muster-train", "torch", "lightning", "accelerate", "torchrunx", "tensorboard", "numpy")
    machine = {
        "cpus": os.cpu_count(), "machine": platform.machine(), "system": platform.system(),
        "python": platform.python_version(), "load": [round(value, 2) for value in os.getloadavg()],
        "versions": {package: installed(package) for package in packages},
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **values}, indent=1) + "\n")
