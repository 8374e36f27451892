"""What an agent finds out about its own ranks when something is wrong: which one failed first, or hangs, and why.

How failures of all nodes are compared, and what is said about them: `trainer.agent.failure`.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.agent.failure import Failure, classify, describe_exit, first_failure, oom_kills
from trainer.agent.rank_process import STACKS
from trainer.config.job import Job
from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB
from trainer.records import read_json
from trainer.reporting.heartbeat import Beat, Heartbeat
from trainer.run.folder import RunFolder
from trainer.run.log_tail import last_lines, size
from trainer.wiring.node import Wiring

FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
WAITING = re.compile(
    r"distributed_c10d\.py|autograd/graph\.py|distributed/rendezvous\.py|parallel/distributed\.py|cuda/streams\.py"
)
"""Where in torch a rank waits for others: a collective, the backward pass that runs them, what DDP does between.

On GPUs collectives are queued: what waits is the look at a number that comes after them.
"""
STACKS_S = 2.0
"""For the stacks to be written: longer means that a rank is in uninterruptible sleep."""
CAUSE_S = 3.0
"""For a rank that is about to end with the cause, when others have ended with its consequences already."""
TORCH = re.compile(r"/torch/")
TRAINER = Path(__file__).parents[1]


@dataclass(frozen=True)
class Frame:
    """A line of a Python stack."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        """For a message."""
        return f"{self.function} ({Path(self.file).name}:{self.line})"


class Diagnosis:
    """Looks at the ranks of one node."""

    def __init__(self, job: Job, run: RunFolder, wiring: Wiring, heartbeat: Heartbeat) -> None:
        """Remember where to look."""
        self.job, self.run, self.wiring, self.heartbeat = job, run, wiring, heartbeat
        self.host = socket.gethostname()
        self.start_attempt(0)

    def start_attempt(self, attempt: int) -> None:
        """New ranks start: remember what was there before them."""
        self.attempt = attempt
        self.oom_before = oom_kills()
        self.moved: dict[int, float] = {}
        ranks = range(self.first_rank(), self.first_rank() + self.job.ranks_per_node)
        self.log_sizes = {rank: size(self.run.rank_log(rank)) for rank in ranks}

    def first_rank(self) -> int:
        """The global rank of this node's first rank."""
        return self.wiring.node_rank * self.job.ranks_per_node

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
            living = [process.exitcode is None for process in processes]
            failures = [self._failure(index, process.exitcode) for index, process in enumerate(processes)]
            first = first_failure([failure for failure in failures if failure is not None])
            if first is not None and not first.is_consequence:
                return first
            undecided = any(lives and failure is None for lives, failure in zip(living, failures, strict=True))
            if not undecided or time.monotonic() > end or known_elsewhere():
                return first
            time.sleep(0.02)

    def _failure(self, index: int, code: int | None) -> Failure | None:
        """What a rank failed of: its record comes before its end, or never."""
        rank = self.first_rank() + index
        log = self.run.rank_log(rank)
        oom = oom_kills() > self.oom_before
        record = read_json(self.run.rank_failure(self.attempt, rank))
        if record is not None:
            kind = classify(record["code"], " ".join(record["chain"]), record["message"], "", oom)
            name = "" if record["code"] == WRONG_JOB else f"{record['exception']}: "
            return self._of_rank(rank, record["time"], record["code"], kind, name + record["message"])
        if code is None or not self._is_failure(index, code):
            return None
        message = describe_exit(code) + (" in the middle of the training" if code == DONE else "")
        message += ": the kernel killed it for memory" if oom and code == -signal.SIGKILL else ""
        kind = classify(code, "", message, last_lines(log, self.log_sizes[rank]), oom)
        return self._of_rank(rank, time.time(), code, kind, message)

    def _of_rank(
        self, rank: int, when: float, code: int, kind: str, message: str, waiting: bool = False
    ) -> Failure:  # fmt: skip
        log = str(self.run.rank_log(rank))
        return Failure(self.wiring.node_rank, self.host, rank, when, code, kind, message, log, waiting)

    def lost_node(self, node: int, message: str) -> Failure:
        """Another node went away."""
        log = str(self.run.logs)
        return Failure(node, self.wiring.hostnames[node], None, time.time(), FAILED, "peer lost", message, log)

    def lost_fork_server(self, error: BaseException) -> Failure:
        """The ranks could not be started."""
        message = f"the process that ranks are forked from is gone ({type(error).__name__})"
        log = str(self.run.node_log(self.wiring.node_rank))
        return Failure(self.wiring.node_rank, self.host, None, time.time(), FAILED, "killed", message, log)

    def find_hung(self, processes: list[Any], spawned: float, alarmed: bool = False) -> Failure | None:
        """A rank without a heartbeat for too long; the stacks of all go to the run folder first.

        `alarmed`: another node found one that hangs, or its ranks waiting for one that hangs here.
        """
        now = time.monotonic()
        found: dict[int, tuple[float, Beat]] = {}
        for index, process in enumerate(processes):
            if process.exitcode is not None:
                continue
            beat = self._beat(index, process.pid, now)
            starting = beat.time == 0 or beat.phase == "starting"
            limit = self.job.agent.start_timeout_s if starting else self.job.agent.hang_timeout_s
            found[index] = (now - max(beat.time, spawned)) / limit, beat
        if not alarmed and all(share <= 1 for share, _ in found.values()):
            return None
        # Those that wait for a rank fell silent when it did, give or take a step: which one it is, the stacks tell.
        late = {index: beat for index, (share, beat) in found.items() if share > 0.5}
        if not late:
            self.dump_stacks(processes)
            return None
        stopped = {index for index in late if process_state(processes[index].pid) == "T"}
        stacks = self.dump_stacks(processes)
        for index in stopped:
            os.kill(processes[index].pid, signal.SIGSTOP)  # it shall not go on: its stacks were all we wanted
        waiting = {index for index, stack in stacks.items() if only_waits(stack)} - stopped
        index = min(late, key=lambda index: (index not in stopped, index in waiting, late[index].step))
        rank, beat = self.first_rank() + index, late[index]
        silent = now - max(beat.time, spawned)
        what = f"no heartbeat for {silent:.0f} s after step {beat.step} while {beat.phase}"
        if self.job.script:
            what = f"does nothing for {silent:.0f} s"
        state = " (the process is stopped)" if index in stopped else ""
        message = f"{what}{state}{where(stacks.get(index, []))}; stacks of all ranks: {self.run.stacks('*')}"
        self.run.record("hung", rank=rank, step=beat.step, attempt=self.attempt)
        return self._of_rank(rank, time.time(), FAILED, "hung", message, index in waiting)

    def _beat(self, index: int, pid: int, now: float) -> Beat:
        """A rank's last sign of life: a task's heartbeat; of a script no more is known than that it is not stopped."""
        if not self.job.script:
            return self.heartbeat.read(index)
        if process_state(pid) != "T" or index not in self.moved:
            self.moved[index] = now
        return Beat(self.moved[index], 0, "training")

    def dump_stacks(self, processes: list[Any]) -> dict[int, list[Frame]]:
        """Make every rank write its Python stacks; return that of each main thread, which comes last."""
        files = {index: self.run.stacks(self.first_rank() + index) for index in range(len(processes))}
        before = {index: size(file) for index, file in files.items()}
        for index, process in enumerate(processes):
            try:
                os.kill(process.pid, STACKS)
                os.kill(process.pid, signal.SIGCONT)  # a stopped process writes its stacks too, then is killed
            except ProcessLookupError:
                del files[index]
        end, last = time.monotonic() + STACKS_S, before
        while time.monotonic() < end:
            time.sleep(0.05)
            sizes = {index: size(file) for index, file in files.items()}
            if sizes == last and all(sizes[index] > before[index] for index in files):
                break
            last = sizes
        stacks = {}
        for index, file in files.items():
            if file.exists():
                text = file.read_bytes()[before[index] :].decode(errors="replace")
                frames = FRAME.findall(text.rpartition("most recent call first):")[2])
                stacks[index] = [Frame(*found) for found in frames]
        return stacks


def where(stack: list[Frame]) -> str:
    """The innermost function, and whose it is when it is torch's."""
    if not stack:
        return ""
    own = next((frame for frame in stack if not TORCH.search(frame.file)), stack[0])
    called = "" if own is stack[0] else f", called in {own}"
    return f", in {stack[0]}{called}"


def only_waits(stack: list[Frame]) -> bool:
    """Whether a rank waits for others in the trainer's own collectives: not in one that user code called."""
    inner = list(itertools.takewhile(lambda frame: TORCH.search(frame.file), stack))
    caller = Path(stack[len(inner)].file) if len(inner) < len(stack) else Path()
    called_by_us = caller.is_relative_to(TRAINER) and not caller.is_relative_to(TRAINER / "tasks")
    return called_by_us and any(WAITING.search(frame.file) for frame in inner)


def process_state(pid: int) -> str:
    """The kernel's one-letter state of a process (proc(5)); empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
