"""What an agent finds out about its own ranks when something is wrong: who is hung, who died first and of what."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from trainer.config import Job
from trainer.entry import STACKS
from trainer.errors import DONE, FAILED, STOPPED
from trainer.heartbeat import Beat, Heartbeat
from trainer.postmortem import Failure, classify, describe_exit, first_failure, oom_kills
from trainer.record import read_json, record_event
from trainer.tail import last_lines
from trainer.wiring import Wiring

WAITING = re.compile(r"distributed_c10d\.py|autograd/graph\.py|distributed/rendezvous\.py|_tensor\.py.*backward")
"""Frames of a rank that waits for other ranks: a collective, or the backward pass that runs them."""


MAIN_THREAD = "most recent call first):"
"""What faulthandler writes above each thread's frames; the main thread comes last."""


class Autopsy:
    """Looks at the ranks of one node."""

    def __init__(self, job: Job, run: Path, wiring: Wiring, heartbeat: Heartbeat) -> None:
        """Remember where to look."""
        self.job, self.run, self.wiring, self.heartbeat = job, run, wiring, heartbeat
        self.host = socket.gethostname()
        self.attempt = 0
        self.oom_before = oom_kills()
        self.moved: dict[int, float] = {}

    def first_rank(self) -> int:
        """The global rank of this node's first rank."""
        return self.wiring.node_rank * self.job.ranks_per_node

    def log(self, rank: int) -> Path:
        """A rank's log."""
        return self.run / "logs" / f"rank-{rank}.log"

    def failed(self, processes: list[Any]) -> list[int]:
        """The ranks that ended and should not have, or not so."""
        return [index for index, process in enumerate(processes) if self._is_failure(index, process.exitcode)]

    def _is_failure(self, index: int, code: int | None) -> bool:
        if code == DONE:  # a task that calls exit() leaves the others waiting
            return not self.job.script and self.heartbeat.read(index).phase != "finishing"
        return code not in (None, STOPPED)

    def describe(self, processes: list[Any]) -> Failure:
        """The first failure among ranks that died; gives their records a moment to appear."""
        end = time.monotonic() + 0.3
        while time.monotonic() < end and not any(p.exitcode not in (None, 0, 1) for p in processes):
            records = [self._record(index) for index in range(len(processes))]
            if any(r and not self._lost(r) for r in records):
                break
            time.sleep(0.02)
        failures = [self._one(index, processes[index].exitcode) for index in self.failed(processes)]
        found = first_failure(failures)
        assert found is not None
        return found

    def _record(self, index: int) -> dict[str, Any] | None:
        return read_json(self.run / "failures" / f"attempt-{self.attempt}-rank-{self.first_rank() + index}.json")

    def _lost(self, record: dict[str, Any]) -> bool:
        kind = classify(record["code"], record["exception"], record["message"], "", False)
        return kind == "peer lost"

    def _one(self, index: int, code: int) -> Failure:
        rank = self.first_rank() + index
        record = self._record(index)
        log = self.log(rank)
        oom = oom_kills() > self.oom_before
        if record is None:
            message = describe_exit(code) + (": the kernel killed it for memory" if oom and code == -9 else "")
            kind = classify(code, "", message, last_lines(log), oom)
            return Failure(self.wiring.node_rank, self.host, rank, time.time(), code, kind, message, str(log))
        kind = classify(record["code"], " ".join(record["chain"]), record["message"], "", oom)
        message = f"{record['exception']}: {record['message']}" if record["code"] != 64 else record["message"]
        return Failure(
            self.wiring.node_rank, self.host, rank, record["time"], record["code"], kind, message, str(log)
        )  # fmt: skip

    def peer(self, node: int, message: str) -> Failure:
        """Another node went away."""
        return Failure(
            node, self.wiring.hostnames[node], None, time.time(), 1, "peer lost", message, str(self.run / "logs")
        )  # fmt: skip

    def template(self, error: BaseException) -> Failure:
        """The ranks could not be started."""
        message = f"the process that ranks are forked from is gone ({type(error).__name__})"
        log = str(self.run / "logs" / f"node-{self.wiring.node_rank}.log")
        return Failure(self.wiring.node_rank, self.host, None, time.time(), FAILED, "killed", message, log)

    def find_hung(self, processes: list[Any], spawned: float, alarmed: bool = False) -> Failure | None:
        """A rank without a heartbeat for too long; the stacks of all go to the run folder first.

        `alarmed`: another node found something already, maybe its ranks waiting for the one that hangs here.
        """
        now = time.monotonic()
        late: list[tuple[int, float]] = []
        for index, process in enumerate(processes):
            if process.exitcode is not None:
                continue
            beat = self._beat(index, process.pid, now)
            starting = beat.time == 0 or beat.phase == "starting"
            limit = self.job.agent.start_timeout_s if starting else self.job.agent.hang_timeout_s
            silent = now - max(beat.time, spawned)
            if silent > (limit / 2 if alarmed else limit):
                late.append((index, silent))
        if not late:
            return None
        stopped = [index for index, _ in late if process_state(processes[index].pid) == "T"]
        stacks = self.dump_stacks(processes)
        waiting = {index for index, text in stacks.items() if WAITING.search(text)} - set(stopped)
        steps = {index: self.heartbeat.read(index).step for index, _ in late}
        index, silent = min(late, key=lambda item: (item[0] not in stopped, item[0] in waiting, steps[item[0]]))
        rank = self.first_rank() + index
        beat = self.heartbeat.read(index)
        what = f"no heartbeat for {silent:.0f} s after step {beat.step} while {beat.phase}"
        if self.job.script:
            what = f"does nothing for {silent:.0f} s"
        state = " (the process is stopped)" if index in stopped else ""
        message = (f"{what}{state}{_where(stacks.get(index, ''))}; "
                   f"stacks of all ranks: {self.run / 'logs'}/stacks-rank-*.txt")  # fmt: skip
        record_event(self.run, "hung", rank=rank, step=beat.step, attempt=self.attempt)
        return Failure(
            self.wiring.node_rank, self.host, rank, time.time(), FAILED, "hung", message, str(self.log(rank)),
            waiting=index in waiting,
        )  # fmt: skip

    def _beat(self, index: int, pid: int, now: float) -> Beat:
        """A rank's last sign of life: a task's heartbeat; of a script no more is known than that it is not stopped."""
        if not self.job.script:
            return self.heartbeat.read(index)
        if process_state(pid) != "T" or index not in self.moved:
            self.moved[index] = now
        return Beat(self.moved[index], 0, "training")

    def dump_stacks(self, processes: list[Any]) -> dict[int, str]:
        """Make every rank write its Python stacks; return that of each main thread."""
        files = [self.run / "logs" / f"stacks-rank-{self.first_rank() + i}.txt" for i in range(len(processes))]
        before = [file.stat().st_size if file.exists() else 0 for file in files]
        for process in processes:
            if process.exitcode is None:
                os.kill(process.pid, STACKS)
                os.kill(process.pid, 18)  # SIGCONT: a stopped process writes its stacks too, then is killed
        end = time.monotonic() + 1.0
        while time.monotonic() < end and any(
            not file.exists() or file.stat().st_size == size for file, size in zip(files, before, strict=True)
        ):
            time.sleep(0.02)
        time.sleep(0.05)
        texts = {}
        for index, (file, size) in enumerate(zip(files, before, strict=True)):
            if file.exists():
                texts[index] = file.read_bytes()[size:].decode(errors="replace").rpartition(MAIN_THREAD)[2]
        return texts


def _where(stack: str) -> str:
    """The innermost Python frame of a stack."""
    match = re.search(r'File "([^"]+)", line (\d+) in (\S+)', stack)
    return f", in {match[3]} ({Path(match[1]).name}:{match[2]})" if match else ""


def process_state(pid: int) -> str:
    """The kernel's one-letter state of a process (proc(5)); empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
