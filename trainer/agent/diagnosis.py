"""What an agent finds out about its own ranks when something is wrong: which one failed first, or hangs, and why.

How failures of all nodes are compared, and what is said about them: `trainer.agent.failure`.
"""

import dataclasses
import itertools
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainer.agent.awake_clock import CLOCK
from trainer.agent.exception_place import is_ours
from trainer.agent.failure import Failure, classify, describe_exit, first_failure, oom_kills
from trainer.agent.fork_server import is_gone
from trainer.agent.rank_process import STACKS, STACKS_FILE
from trainer.config.job import Job
from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB
from trainer.records import parse_lines, read_json
from trainer.reporting.heartbeat import FIRST_PHASES, PHASES, UNSEEN, Heartbeat
from trainer.run.folder import RunFolder
from trainer.run.log_tail import Tail, last_lines, size
from trainer.signals import process_stat
from trainer.wiring.node import Wiring

FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
WAITING = re.compile(
    r"distributed_c10d\.py|autograd/graph\.py|distributed/rendezvous\.py|parallel/distributed\.py|cuda/streams\.py"
)
"""Where in torch a rank waits for others: a collective, the backward pass that runs them, what DDP does between.

On GPUs collectives are queued: what waits is the look at a number that comes after them.
"""
STACKS_S = 2.0  # for the stacks to be written: longer means that a rank is in uninterruptible sleep
CAUSE_S = 3.0  # for a rank that is about to end with the cause, when others have ended with its consequences already
BRIEFLY_S = 60.0  # a script that fails the same way within this time of its start, twice, will do so every time
CERTAIN = ("user code", "data")
"""Kinds that may be sure to repeat; all others come from outside of the code."""
UNKNOWN_END = 255
"""Exit code of a process whose fork server could not tell it any more; a program may choose it as well."""
WORKER_LOST = "exited unexpectedly"
"""torch's words for a loader worker that was killed; kind `data`, but not the code's doing."""
WORKER_WAITS = (
    " (it waits for a loader worker; pools of threads and locks that a dataset made before do not work there; make "
    "them when the first sample is read, or set data.workers=0)"
)


class Frame(NamedTuple):
    """A line of a Python stack."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


class Diagnosis:
    """Looks at the ranks of one node."""

    def __init__(self, job: Job, run: RunFolder, wiring: Wiring, heartbeat: Heartbeat, folder: Path) -> None:
        """`folder`: of this agent alone."""
        self.job, self.run, self.wiring, self.heartbeat, self.folder = job, run, wiring, heartbeat, folder
        self.first_rank = wiring.node_rank * job.ranks_per_node
        source = read_json(run.source) or {}
        folders = (source[key] for key in ("working_directory", "job_folder") if key in source)
        self.roots = [run.code, *map(Path, folders)]  # where the user's code may lie
        self.start_attempt(0)

    def start_attempt(self, attempt: int) -> None:
        """New ranks start: remember what was there before them."""
        self.attempt, self.began = attempt, time.monotonic()
        self.oom_before = oom_kills()
        ranks = range(self.first_rank, self.first_rank + self.job.ranks_per_node)
        self.log_sizes = {rank: size(self.run.rank_log(rank)) for rank in ranks}

    def failed(self, processes: list[Any]) -> list[int]:
        """The ranks that ended and should not have, or not so."""
        return [index for index, process in enumerate(processes) if self._is_failure(index, process.exitcode)]

    def _is_failure(self, index: int, code: int | None) -> bool:
        if code == DONE:  # a task that calls exit() leaves the others waiting
            return not self.job.script and self.heartbeat.read(index).phase != "finishing"
        return code not in (None, STOPPED)

    def find_cause(self, processes: list[Any], known_elsewhere: Callable[[], bool]) -> Failure | None:
        """The first failure among these ranks. What is no more than a consequence gives the cause time to show.

        Only ranks of this node are looked at. The wait ends early when none of them can still tell anything, or when
        the cause is `known_elsewhere`.
        """
        end = time.monotonic() + CAUSE_S
        while True:
            found = [(rank.exitcode, self._failure(index, rank.exitcode)) for index, rank in enumerate(processes)]
            first = first_failure([failure for _, failure in found if failure is not None])
            undecided = any(code is None and failure is None for code, failure in found)
            explained = first is not None and not first.is_consequence
            if explained or not undecided or time.monotonic() > end or known_elsewhere():
                return first
            time.sleep(0.02)

    def _failure(self, index: int, code: int | None) -> Failure | None:
        """What a rank failed of: its record comes before its end, or never."""
        rank = self.first_rank + index
        oom = oom_kills() > self.oom_before
        told = parse_lines([self.heartbeat.words(index)])
        record = read_json(self.run.rank_failure(self.attempt, rank)) or next(iter(told), None)
        if record is not None:
            record["said"] = without_traceback(record["message"])
            kind = classify(record["code"], " ".join(record["chain"]), record["said"], "", oom)
            if record["code"] == WRONG_JOB:
                return self._of(rank, kind, record["message"], record["code"], record["time"])
            return self._raised(index, kind, record)
        if code is None or not self._is_failure(index, code):
            return None
        if code == UNKNOWN_END and is_gone():
            return self._of(rank, "killed", "the process that it was forked from was ended, and it with that", code)
        message = describe_exit(code) + (" in the middle of the training" if code == DONE else "")
        message += ": the kernel killed it for memory" if oom and code == -signal.SIGKILL else ""
        kind = classify(code, "", message, last_lines(self.run.rank_log(rank), self.log_sizes[rank], 8000), oom)
        return self._of(rank, kind, message, code)

    def _raised(self, index: int, kind: str, record: dict[str, Any]) -> Failure:
        """The failure of a rank that raised an exception: where, after which step, and whether it may pass."""
        message = f"{record['exception']}: {record['said']}"
        failure = self._of(self.first_rank + index, kind, message, record["code"], record["time"])
        place = record["place"]
        beat = self.heartbeat.read(index)
        late = beat.phase in UNSEEN and record["time"] - self.began > BRIEFLY_S  # nobody knows how far it was
        outside = record.get("from_outside", False) or WORKER_LOST in message
        return dataclasses.replace(
            failure, cause=f"{record['exception']} at {place}" if place else record["exception"], at_step=beat.step,
            passing=kind not in CERTAIN or late or outside,
        )  # fmt: skip

    def _of(
        self, rank: int | None, kind: str, message: str, code: int = FAILED, when: float = 0.0, waiting: bool = False
    ) -> Failure:  # fmt: skip
        """The failure of a rank of this node, or of its agent."""
        node = self.wiring.node_rank
        log = self.run.node_log(node) if rank is None else self.run.rank_log(rank)
        return Failure(
            node,
            socket.gethostname(),
            rank,
            (when or time.monotonic()) - self.began,
            code,
            kind,
            message,
            str(log),
            waiting,
        )

    def lost_node(self, node: int, message: str) -> Failure:
        """Another node went away."""
        host, log = self.wiring.hostnames[node], str(self.run.logs)
        return Failure(node, host, None, time.monotonic() - self.began, FAILED, "peer lost", message, log)

    def lost_fork_server(self, error: BaseException) -> Failure:
        """The ranks could not be started."""
        return self._of(None, "killed", f"the process that ranks are forked from is gone ({type(error).__name__})")

    def find_hung(self, processes: list[Any], spawned: float, alarmed: bool = False) -> Failure | None:
        """A rank without a heartbeat for too long; the stacks of all go to the run folder first.

        `alarmed`: another node found one that hangs, or its ranks waiting for one that hangs here.
        """
        living = [index for index, process in enumerate(processes) if process.exitcode is None]
        for index in living:  # of a script without a session no more is known than whether it is stopped
            unseen = self.job.script and self.heartbeat.read(index).phase in UNSEEN
            if unseen and process_state(processes[index].pid) != "T":
                self.heartbeat.beat(index, 0, "script")
        beats = {index: self.heartbeat.read(index) for index in living}
        silent = {index: CLOCK.since(max(beat.time, spawned)) for index, beat in beats.items()}
        limits = dict.fromkeys(PHASES, self.job.agent.hang_timeout_s)
        limits |= dict.fromkeys(FIRST_PHASES, self.job.agent.start_timeout_s)
        limit = {index: limits[beat.phase] for index, beat in beats.items()}
        over = [limit[index] for index in living if silent[index] > limit[index]]
        if not alarmed and not over:
            return None
        # Those that wait for a rank fell silent when it did, give or take a step: which one it is, the stacks tell.
        late = [index for index in living if silent[index] > min([limit[index], *over]) / 2]
        stopped = [index for index in living if process_state(processes[index].pid) == "T"]
        late = sorted({*late, *stopped})  # our clock may have stood still for most of the time
        stacks = self._dump_stacks(processes)
        for index in stopped:
            os.kill(processes[index].pid, signal.SIGSTOP)  # it shall not go on: its stacks were all we wanted
        if not late:
            return None
        waiting = [index for index, stack in stacks.items() if only_waits(stack) and index not in stopped]
        index = min(late, key=lambda index: (index not in stopped, index in waiting, beats[index].step))
        rank, beat = self.first_rank + index, beats[index]
        what = f"no heartbeat for {silent[index]:.0f} s after step {beat.step} while {beat.phase}"
        if beat.phase == "script":
            what = f"does nothing for {silent[index]:.0f} s"
        state = " (the process is stopped)" if index in stopped else ""
        all_stacks = self.run.stacks(rank).with_name("stacks-rank-*.txt")
        message = f"{what}{state}{where(stacks.get(index, []))}; stacks of all ranks: {all_stacks}"
        self.run.record("hung", rank=rank, step=beat.step, attempt=self.attempt)
        return self._of(rank, "hung", message, waiting=index in waiting)

    def _dump_stacks(self, processes: list[Any]) -> dict[int, list[Frame]]:
        """Make every rank write its Python stacks; return that of each main thread, which comes last."""
        living = {index: process for index, process in enumerate(processes) if process.exitcode is None}
        files = {index: Tail(self.folder / f"{STACKS_FILE}{index}") for index in living}
        for index, process in living.items():  # the number of one that ended is somebody else's by now
            try:
                os.kill(process.pid, STACKS)
                os.kill(process.pid, signal.SIGCONT)  # a stopped process writes its stacks too, then is killed
            except ProcessLookupError:
                del files[index]
        texts, new, end = dict.fromkeys(files, b""), True, time.monotonic() + STACKS_S
        while (new or not all(texts.values())) and time.monotonic() < end:
            time.sleep(0.05)
            written = {index: file.read() for index, file in files.items()}
            texts = {index: text + written[index] for index, text in texts.items()}
            new = any(written.values())
        for index, text in texts.items():
            with suppress(OSError), self.run.stacks(self.first_rank + index).open("ab") as file:
                file.write(text)
        mains = {index: text.decode(errors="replace").rpartition("call first):")[2] for index, text in texts.items()}
        return {index: [Frame(*found) for found in FRAME.findall(main)] for index, main in mains.items()}


def without_traceback(message: str) -> str:
    """The message of an exception; of one in a loader worker, whose traceback torch puts into it, that alone."""
    if "Original Traceback" not in message:
        return message
    last = message.rstrip().rpartition("\n")[2].strip()
    return f"{last.partition(': ')[2] or last} (in a loader worker)"


def where(stack: list[Frame]) -> str:
    """The innermost function, and whose it is when it is torch's."""
    if not stack:
        return ""
    own = next((frame for frame in stack if "/torch/" not in frame.file), stack[0])
    called = "" if own is stack[0] else f", called in {own}"
    loads = any(frame.file.endswith("utils/data/dataloader.py") for frame in stack)
    return f", in {stack[0]}{called}{WORKER_WAITS if loads else ''}"


def only_waits(stack: list[Frame]) -> bool:
    """Whether a rank waits for others in the trainer's own collectives: not in one that user code called."""
    inner = list(itertools.takewhile(lambda frame: "/torch/" in frame.file, stack))
    called_by_us = len(inner) < len(stack) and is_ours(Path(stack[len(inner)].file))
    return called_by_us and any(WAITING.search(frame.file) for frame in inner)


def process_state(pid: int) -> str:
    """The kernel's one-letter state of a process (proc(5)); empty when it is gone."""
    return "".join(process_stat(pid)[:1])
