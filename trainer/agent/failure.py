"""A failure: its class, its remedy, which of several came first, and the paragraph that tells all this."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from trainer.errors import WRONG_JOB


@dataclass(frozen=True)
class Failure:
    """One rank's, or one node's, failure."""

    node: int
    host: str
    rank: int | None
    time: float
    code: int
    kind: str
    """The class: a key of `REMEDIES`."""
    message: str
    log: str
    waiting: bool = False
    """The rank hangs because it waits for others."""

    @property
    def distance(self) -> int:
        """How far this is from the cause, by its nature: 0 for what fails by itself, more for what follows from it."""
        if self.waiting:
            return 3
        if self.kind != "peer lost":
            return 0
        return 1 if self.rank is None else 2  # an agent that is gone explains ranks that lost a peer

    @property
    def is_consequence(self) -> bool:
        """Whether something else must have failed first, here or on another node."""
        return self.distance > 1


REMEDIES = {
    "config": "Correct the job file or the command",
    "out of memory": "Lower train.batch_size or raise train.accumulate, or ask for more memory in the site file",
    "shm": "Give the container a larger /dev/shm (docker --shm-size; Kubernetes: a Memory emptyDir) or data.workers=0",
    "port": "Another process holds the port; unset MASTER_PORT so that a free one is chosen",
    "interface": "Name the interface in the site's network profile (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
    "DNS": "Check that the host names resolve on every node (Kubernetes: headless Service, publishNotReadyAddresses)",
    "peer lost": "Look at the named peer: its node or process went away first",
    "preempted": "Nothing is wrong: resume the run, it continues from its checkpoint",
    "hung": "Read logs/stacks-rank-*.txt; raise agent.hang_timeout_s if the step is really that slow",
    "killed": "Something outside killed it: look at the scheduler's and the kernel's log of that host",
    "crashed": "Native code crashed; the Python stack is in the rank's log",
    "disk full": "Free space in the runs folder, or lower checkpoint.keep_last; committed checkpoints are intact",
    "loss": "Lower train.lr, set train.clip_norm, look at the named samples, or set train.on_nan=skip",
    "data": "Look at the named samples or files",
    "user code": "Correct the code at the line that the log names",
}

PATTERNS: tuple[tuple[str, str], ...] = (
    ("disk full", r"No space left on device|Disk quota exceeded"),
    ("shm", r"shared memory|/dev/shm|unable to (open|allocate) shared|Bus error"),
    ("out of memory", r"out of memory|OutOfMemoryError|MemoryError|can't allocate memory|Cannot allocate memory"),
    ("port", r"EADDRINUSE|address already in use|candidates could be bound"),
    ("DNS", r"Name or service not known|Temporary failure in name resolution|getaddrinfo|gaierror|does not resolve"),
    ("interface", r"unable to find (network )?interface|no (usable|routable) (interface|address)|Bootstrap : no socket"
                  r"|Unable to resolve hostname|makeDeviceForInterface"),
    ("peer lost", r"Connection (closed by peer|reset by peer|refused)|Broken pipe|Socket closed|ncclRemoteError"
                  r"|NCCL communicator was aborted|Timed out waiting|recvValue failed|connectFullMesh|DistNetworkError"
                  r"|DistBackendError|another rank|rank 0 could not save|wait timeout|Connection was likely closed"),
    ("loss", r"NonFiniteLoss"),
    ("data", r"DamagedCheckpoint|DataLoader worker|EOFError|UnpicklingError|FileNotFoundError"),
)  # fmt: skip


def classify(code: int, exception: str, message: str, log_tail: str, oom_killed: bool) -> str:
    """The class of a failure from its exit code, exception and the end of its log."""
    if code == WRONG_JOB:
        return "config"
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        if number == signal.SIGKILL:
            return "out of memory" if oom_killed else "killed"
        if number == signal.SIGBUS:
            return "shm"
        if number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            return "preempted"
        return "crashed"
    for text in (f"{exception}: {message}", log_tail if not exception else ""):
        for kind, pattern in PATTERNS:
            if text and re.search(pattern, text, re.IGNORECASE if kind not in ("loss", "data") else 0):
                return kind
    return "user code"


def first_failure(failures: list[Failure]) -> Failure | None:
    """The cause among its consequences: by what they are, and only then by when they were noticed."""
    return min(failures, key=lambda failure: (failure.distance, failure.time), default=None)


def paragraph(failure: Failure, outcome: str, run: str | PathLike[str]) -> str:
    """One paragraph: node, rank, exception, class, fix, logs."""
    who = f"rank {failure.rank} on node {failure.node}" if failure.rank is not None else f"node {failure.node}"
    message = " ".join(failure.message.split())[:500]
    return (
        f"{who} ({failure.host}) failed first [{failure.kind}]: {message or 'no message'}. "
        f"{REMEDIES[failure.kind]}. {outcome} Logs: {failure.log}; everything: {run}"
    )


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        try:
            return f"ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"ended by signal {-code}"
    return f"ended with exit code {code}"


def oom_kills() -> int:
    """How often the kernel has killed a process of this cgroup for memory; 0 where it cannot be told."""
    for path, key in ((_cgroup("memory") / "memory.events", "oom_kill"),
                      (_cgroup("memory") / "memory.oom_control", "oom_kill"),
                      (Path("/sys/fs/cgroup/memory.events"), "oom_kill"),
                      (Path("/sys/fs/cgroup/memory/memory.oom_control"), "oom_kill")):  # fmt: skip
        try:
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == key:
                    return int(value)
        except (OSError, ValueError):
            continue
    return 0


def _cgroup(controller: str) -> Path:
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(","):
                return Path("/sys/fs/cgroup", controller, path.lstrip("/"))
            if not names:
                return Path("/sys/fs/cgroup", path.lstrip("/"))
    except (OSError, ValueError):
        pass
    return Path("/nonexistent")
