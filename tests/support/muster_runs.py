"""Runs as a user starts them, watched through what they leave in their folder, and taken down by process id."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.records import read_json
from trainer.run.folder import RunFolder
from trainer.signals import process_stat as stat

HERE = Path(__file__).parent
MUSTER = str(Path(sys.executable).with_name("muster"))
FULL = bool(os.environ.get("MUSTER_FULL"))
"""Whether to repeat as often as a release asks for: half an hour instead of minutes."""
PATIENCE_S = 240.0
"""For what takes a second on an idle machine."""


def environment(**variables: str) -> dict[str, str]:
    """Of a command that a user types: ours without what may have been left in it."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    kept = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith(("MUSTER_", "SLURM_", "TORCH"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}", **variables}


def muster(*words: str | Path, cwd: Path = HERE, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [MUSTER, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), check=False, **options)


def wait_for(what: str, ready: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """What `ready` returns once it is true."""
    end = time.monotonic() + timeout_s
    while not (found := ready()):
        assert time.monotonic() < end, f"{what}: not after {timeout_s:.0f} s"
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return stat(pid)[:1] not in ([], ["Z"], ["X"])


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    found = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [child for child in found if stat(child)[1:2] == [str(pid)]]


def descendants(pid: int) -> list[int]:
    """All that a process started and what that started."""
    return [item for child in children(pid) for item in (child, *descendants(child))]


def command_line(pid: int) -> bytes:
    """Of a process; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process that may have just ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class Run:
    """A run folder that something writes into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sizes: dict[Path, int] | None = None
        self._events: list[dict[str, Any]] = []

    @property
    def job_id(self) -> str:
        """What its agents are told: ports follow from it, and tests at the same time must not meet."""
        return f"{self.folder.name}-{hashlib.sha256(bytes(self.folder)).hexdigest()[:8]}"

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The events of some kinds, in order. They are read when there are new ones: a long run has thousands."""
        run = RunFolder(self.folder)
        sizes = {path: path.stat().st_size for path in run.event_files()}
        if sizes != self._sizes:
            self._sizes, self._events = sizes, run.read_events()
        return [event for event in self._events if event["event"] in names]

    def wait(self, name: str, count: int = 1, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """The so-manieth event of a kind."""
        found = wait_for(f"event {name} {count} of {self.folder}", lambda: self.events(name)[count - 1 :], timeout_s)
        event: dict[str, Any] = found[0]
        return event

    def ranks(self) -> dict[int, int]:
        """The process ids of the newest attempt's ranks."""
        started = self.events("ranks")
        attempt = max(event["attempt"] for event in started)
        newest = [event for event in started if event["attempt"] == attempt]
        return {int(rank): pid for event in newest for rank, pid in event["pids"].items()}

    def agents(self) -> dict[int, int]:
        """The process ids of the agents, by node."""
        return {event["node"]: event["pid"] for event in self.events("wired")}

    def template(self, node: int) -> int:
        """The process that the ranks of a node are forked from."""
        found = wait_for("ranks", lambda: [pid for pid in children(self.agents()[node]) if children(pid)])
        assert len(found) == 1
        return int(found[0])

    def order(self, rank: int, word: str) -> None:
        """Make a rank do something (`faulty_tasks`)."""
        pending = self.folder / "orders" / "pending"
        pending.parent.mkdir(exist_ok=True)
        pending.write_text(word)
        pending.rename(self.folder / "orders" / f"rank-{rank}")

    def log(self, name: str) -> str:
        """A file of the folder of logs."""
        path = self.folder / "logs" / name
        return path.read_text() if path.exists() else ""

    def status(self) -> dict[str, Any]:
        """What `muster status --json` says."""
        found: dict[str, Any] = json.loads(muster("status", self.folder, "--json").stdout)
        return found

    def processes(self) -> list[int]:
        """All processes of the run that still exist."""
        return processes_of(str(self.folder))

    def wait_gone(self, timeout_s: float = 60.0) -> None:
        """Until no process of the run is left."""
        wait_for(f"end of the processes of {self.folder}", lambda: not self.processes(), timeout_s)


def processes_of(word: str) -> list[int]:
    """Processes that have a word, such as a folder, in their command line, environment or open files."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            text += " ".join(os.readlink(link) for link in (path / "fd").iterdir()).encode()
        except OSError:
            continue
        if word.encode() in text and int(path.name) != os.getpid() and alive(int(path.name)):
            found.append(int(path.name))
    return found


@contextmanager
def submitted(root: Path, *overrides: str, file: Path = HERE / "faulty.yaml") -> Iterator[Run]:
    """A run that was submitted and goes on by itself; whatever is left of it at the end is killed."""
    done = muster("submit", file, f"runs={root / 'runs'}", *overrides)
    assert done.returncode == 0, done.stderr
    run = Run(Path(done.stdout.split()[-1]))
    try:
        yield run
    finally:
        end_all(run)


def hear_interrupts() -> None:
    """As at a terminal; a shell makes what it starts in the background, such as these tests, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def followed(root: Path, *words: str | Path, **options: Any) -> Iterator[tuple[Run, subprocess.Popen[str]]]:
    """A run in the foreground, and the command that follows it."""
    words = words or (HERE / "faulty.yaml",)
    command = [MUSTER, "run", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE, env=environment(),
        preexec_fn=hear_interrupts, **options,
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("run folder: "), first + process.stdout.read()
    run = Run(Path(first.removeprefix("run folder: ").strip()))
    try:
        yield run, process
    finally:
        kill(process.pid)
        process.wait()
        end_all(run)


def start_agent(
    run: Run, node: int, nodes: int, *overrides: str, enter: Sequence[str] = (), **variables: str
) -> subprocess.Popen[bytes]:
    """One agent, as a template of a platform starts it; `enter` are words that put it onto another host."""
    run.folder.mkdir(exist_ok=True)
    variables = {
        "MUSTER_PLATFORM": "local", "MUSTER_JOB_ID": run.job_id, "MUSTER_NODES": str(nodes),
        "MUSTER_NODE_RANK": str(node), "MUSTER_HOSTNAMES": ",".join(f"127.0.0.{1 + n}" for n in range(nodes)),
        "MUSTER_RUN": str(run.folder), **variables,
    }  # fmt: skip
    command = [*enter, sys.executable, "-m", "trainer", str(HERE / "faulty.yaml"), f"nodes={nodes}", *overrides]
    with (run.folder / f"agent-{node}.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=HERE, env=environment(**variables))


def end_all(run: Run) -> None:
    """Kill what is left of a run, but Python's resource trackers: they unlink semaphores, then end by themselves."""
    end = time.monotonic() + 20
    while (left := run.processes()) and time.monotonic() < end:
        for pid in left:
            if b"resource_tracker" not in command_line(pid):
                kill(pid)
        time.sleep(0.05)


def result(run: Run, timeout_s: float = PATIENCE_S) -> int:
    """The exit code of a submitted run, once it ended."""
    found = wait_for(f"end of {run.folder}", lambda: read_json(run.folder / "exit.json"), timeout_s)
    return int(found["code"])
