"""A failure: its class, its remedy, which of several came first, and the paragraph that tells all this."""

import contextlib
import re
import signal
from dataclasses import dataclass

from trainer.errors import WRONG_JOB
from trainer.signals import SIGNALS
from trainer.wiring.hardware import cgroup_folders


@dataclass(frozen=True)
class Failure:
    """One rank's, or one node's, failure."""

    node: int
    host: str
    rank: int | None
    time: float  # seconds since the agents last met, by the clock of its own node that nobody sets
    code: int
    kind: str  # a key of `KINDS`
    message: str
    log: str
    waiting: bool = False  # the rank hangs because it waits for others
    cause: str = ""  # exception and place, such as "ValueError at cells/bad.py:12"; empty where no exception is known
    at_step: int = -1  # steps that the rank had done; -1 where nobody knows
    passing: bool = True  # it may be another time: anything but an exception that the code itself raises

    @property
    def label(self) -> str:
        """What to call it when failures are counted."""
        return self.cause or self.kind

    @property
    def place(self) -> str:
        """The line that raised the exception, as far as known."""
        return self.cause.partition(" at ")[2]

    def repeats(self, before: "Failure") -> bool:
        """Whether this is the failure of `before` once more, and so will be every time."""
        same = (self.cause, self.at_step) == (before.cause, before.at_step)
        return bool(self.cause) and same and not self.passing and not before.passing

    @property
    def when(self) -> str:
        """Between which steps it came."""
        return f"after step {self.at_step}" if self.at_step > 0 else "before the first step was done"

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


KINDS = {
    # The remedy of each kind, and what its message matches. The first match wins.
    "disk failed": ("Look at the storage of the runs folder, and the host's kernel log; saved checkpoints are intact",
        r"Input/output error|Stale (NFS )?file handle|Read-only file system|Remote I/O error"),
    "shm": ("Give the container a larger /dev/shm (docker --shm-size; Kubernetes: a Memory emptyDir) or data.workers=0",
        r"(?i)shared memory|/dev/shm|unable to (open|allocate) shared|Bus error|unable to write to file </torch_"),
    "disk full": ("Free space in the runs folder, or lower checkpoint.keep_last; committed checkpoints are intact",
        r"(?i)No space left on device|Disk quota exceeded"),
    "out of memory": ("Lower train.batch_size or raise train.accumulate, or ask for more memory in the site file",
        r"(?i)out of memory|OutOfMemoryError|MemoryError|can't allocate memory|Cannot allocate memory"),
    "download": ("Your code could not fetch something: check address and network on that node, or fetch it beforehand",
        r"URLError|HTTPError|HTTPS?ConnectionPool|MaxRetryError|CommError|LocalEntryNotFound|OfflineModeIsEnabled"),
    "port": ("Another process holds the port; unset MASTER_PORT so that a free one is chosen",
        r"(?i)EADDRINUSE|address already in use|candidates could be bound"),
    "DNS": ("Check that the host names resolve on every node (Kubernetes: headless Service, publishNotReadyAddresses)",
        r"(?i)Name or service not known|Temporary failure in name resolution|getaddrinfo|gaierror|does not resolve"),
    "interface": ("Name the interface in the site's network profile (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
        r"(?i)unable to find (network )?interface|no (usable|routable) (interface|address)|Bootstrap : no socket"
        r"|Unable to resolve hostname|makeDeviceForInterface"),
    "peer lost": ("Look at the named peer: its node or process went away first",
        r"(?i)Connection (closed by peer|reset by peer|refused)|Broken pipe|Socket closed|ncclRemoteError"
        r"|NCCL communicator was aborted|Timed out waiting|recvValue failed|connectFullMesh|DistNetworkError"
        r"|DistBackendError|another rank|rank 0 could not save|wait timeout|Connection was likely closed"),
    "collectives": ("Let all ranks call the same collectives, with equal sizes; a task must call none in evaluations, "
        "where one rank has more batches than another",
        r"op\.preamble\.length|mismatch between collectives|Mismatch between collective operation"),
    "loss": ("Lower train.lr, set train.clip_norm, look at the named samples, or set train.on_nan=skip",
        "NonFiniteLoss"),
    "data": ("Look at the named samples or files",
        "DamagedCheckpoint|DataLoader worker|EOFError|UnpicklingError|FileNotFoundError"),
    "config": ("", None),  # what is wrong says how to correct it
    "preempted": ("Nothing is wrong: resume the run, it continues from its checkpoint", None),
    "hung": ("Read logs/stacks-rank-*.txt; raise agent.hang_timeout_s if a step, or the disk, is that slow",
        "nothing was committed for"),
    "killed": ("Something outside killed it: look at the scheduler's and the kernel's log of that host", None),
    "crashed": ("Native code crashed; the Python stack is in the rank's log", None),
    "user code": ("Correct the code at the line that the log names", None),
}  # fmt: skip


def classify(code: int, exception: str, message: str, log_tail: str, oom_killed: bool) -> str:
    """The class of a failure from its exit code, exception and the end of its log."""
    if code == WRONG_JOB:
        return "config"
    number = -code if code < 0 else code - 128  # 128 and more: a shell's child was ended by a signal
    if number == signal.SIGKILL:
        return "out of memory" if oom_killed else "killed"
    if number == signal.SIGBUS:
        return "shm"
    if 0 < number < signal.NSIG:
        mixed = number == signal.SIGABRT and re.search(str(KINDS["collectives"][1]), log_tail)  # gloo ends the process
        return "preempted" if number in SIGNALS else "collectives" if mixed else "crashed"
    for text in (f"{exception}: {message}", log_tail if not exception else ""):
        for kind, (_, pattern) in KINDS.items():
            if pattern and re.search(pattern, text):
                return kind
    return "user code"


def first_failure(failures: list[Failure]) -> Failure | None:
    """The cause among its consequences: by what they are, and only then by when they were noticed.

    Clocks of hosts differ by more than failures do. But all agents start their ranks when they have met, and that is
    at the same moment on all nodes, but for the time between two looks.
    """
    return min(failures, key=lambda failure: (failure.distance, failure.time), default=None)


def paragraph(failure: Failure, outcome: str) -> str:
    """One paragraph: node, rank, exception, class, fix, logs."""
    who = f"rank {failure.rank} on node {failure.node}" if failure.rank is not None else f"node {failure.node}"
    message = " ".join(failure.message.split())[:500]
    place = f" (at {failure.place})" if failure.place else ""
    what = f"{who} ({failure.host}) failed first [{failure.kind}]: {message or 'no message'}{place}"
    return ". ".join(filter(None, (what, KINDS[failure.kind][0], f"{outcome} Logs: {failure.log}")))


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
        return f"ended by signal {-code}"
    return f"ended with exit code {code}" + (", by which it says that the job is wrong" if code == WRONG_JOB else "")


def oom_kills() -> int:
    """How often the kernel has killed a process of this cgroup for memory; 0 where it cannot be told."""
    for folder in cgroup_folders("memory"):
        for name in ("memory.events", "memory.oom_control"):  # of v2 and v1
            with contextlib.suppress(OSError, ValueError, KeyError):
                return int(dict(line.split() for line in (folder / name).read_text().splitlines())["oom_kill"])
    return 0
