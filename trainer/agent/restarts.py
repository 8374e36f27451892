"""What node 0 decides between two rounds of the agents: the next attempt, or that restarting has no point any more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.agent.failure import Failure, first_failure, paragraph
from trainer.checkpoint.memory import Memory
from trainer.config.job import Job
from trainer.errors import FAILED, WRONG_JOB, JobError
from trainer.records import record_event
from trainer.run import attempts as attempt
from trainer.run.folder import steps_committed


class Rounds:
    """Node 0's decisions: which attempt comes next, and when restarting has no point any more."""

    def __init__(self, job: Job, run: Path, say: Callable[[str], None], memory: Memory | None = None) -> None:
        """Nothing failed yet; `say` prints a line; `memory`: of this node, where survivors leave their state."""
        self.job, self.run, self.say, self.memory = job, run, say, memory
        self.used = 0
        self.progress = -1
        self.history: list[dict[str, Any]] = []
        self.attempt: int | None = None
        """The last one that was planned here."""

    def start(self, number: int, failures: list[dict[str, Any] | None]) -> dict[str, Any]:
        """Plan a round, or end the job: `failures` has one entry per node, None where nothing failed."""
        found = first_failure([Failure(**item) for item in failures if item])
        if found is not None:
            self.history.append(found.to_json())
            step = max(steps_committed(self.run), self.memory.step if self.memory else -1)
            self.used = 1 if step > self.progress else self.used + 1
            self.progress = step
            left = self.job.agent.restarts - self.used
            record_event(
                self.run,
                "failure",
                **{k: v for k, v in found.to_json().items() if k != "time"},
                step=step,
                restarts_left=max(left, 0),
            )
            if found.code == WRONG_JOB:
                return {"end": paragraph(found, "It is not retried.", self.run), "code": WRONG_JOB}
            if found.kind == "loss":
                return {"end": paragraph(found, "train.on_nan=halt: it is not retried.", self.run), "code": FAILED}
            if left < 0:
                outcome = f"Gave up after {self.used - 1} restarts without progress (step {max(step, 0)})."
                return {"end": paragraph(found, outcome, self.run), "code": FAILED}
            self.say(
                paragraph(
                    found, f"Restarting from step {max(step, 0)}; {left} restarts without progress are left.", self.run
                )
            )
        try:
            newest = attempt.newest(self.run)
            if self.attempt is not None and newest > self.attempt:  # another launch of the job, which lost sight of us
                word = f"attempt {self.attempt} was replaced by attempt {newest}, which goes on"
                return {"end": word, "code": FAILED}
            value = self.attempt = newest + 1
            attempt.claim(self.run, value)
        except OSError as error:
            raise JobError(
                "runs", str(self.run), f"cannot be written ({error})", "Give a writable runs folder"
            ) from None
        record_event(self.run, "restart" if found else "attempt", attempt=value, round=number)
        return {"attempt": value}
