"""What node 0 decides between two rounds of the agents: the next attempt, or that restarting has no point any more."""

import secrets
from collections.abc import Callable
from dataclasses import asdict

from trainer.agent.failure import KINDS, Failure, classify, first_failure, paragraph
from trainer.agent.rounds import Ended
from trainer.checkpoint.memory import Memory
from trainer.config.job import Job
from trainer.errors import DONE, FAILED, WRONG_JOB, JobError
from trainer.run import attempts
from trainer.run.abilities import PASSING, patiently
from trainer.run.folder import RunFolder


class RestartPolicy:
    """Counts restarts, in all and without progress, and numbers the attempts."""

    def __init__(self, job: Job, run: RunFolder, say: Callable[[str], None], memory: Memory) -> None:
        """`say` prints a line; `memory`: of this node."""
        self.job, self.run, self.say, self.memory = job, run, say, memory
        self.failures: list[Failure] = []  # the first failure of each attempt of this launch
        self.restarts_without_progress = 0
        self.last_step = -1
        self.attempt: int | None = None  # the last one of this launch
        self.launch = secrets.token_hex(8)
        # How often, and on which node, agents were killed without progress, where nobody else counts.
        self.killed = (0, 0)

    def next_attempt(self, round_number: int, failures: list[Failure]) -> int:
        """Decide how it goes on after the failures of all nodes; return the number of the next attempt.

        Raises Ended: it does not go on. Raises JobError: the run folder cannot be written.
        """
        times, node = self.killed
        if times > self.job.agent.restarts:
            problem = f"the agent of node {node} was killed {times} times, and no checkpoint was saved in between"
            remedy = "Only the platform knows why (kubectl describe pods). Often the memory limit is too low"
            raise Ended(f"{problem}. {remedy}", FAILED)
        cause = first_failure(failures)
        if cause is not None:
            self._spend_restart(cause)
        try:
            self.attempt = patiently(self._claim, self.say)
        except attempts.StaleAttempt as error:  # it came between the two looks
            self.memory.attempt = -1  # so that one is not ours, and nothing is written beside it
            raise Ended(f"{error}: another launch of this run goes on", FAILED) from None
        except OSError as error:
            if error.errno in PASSING:  # the job is not to blame
                raise Ended(_unwritable(self.run, error, cause), FAILED) from None
            remedy = "Give a writable runs folder"
            raise JobError("runs", str(self.run), f"cannot be written ({error})", remedy) from None
        self.run.record("restart" if cause else "attempt", attempt=self.attempt, round=round_number)
        return self.attempt

    def _claim(self) -> int:
        """Own the run from here on."""
        newest = attempts.newest(self.run)
        if self.attempt is not None and newest > self.attempt and not self._is_ours(newest):
            # another launch of the job, which lost sight of us
            raise Ended(f"attempt {self.attempt} was replaced by attempt {newest}, which goes on", FAILED)
        self.memory.attempt = newest + 1  # before anyone can see it: what is being saved stays ours
        attempts.claim(self.run, newest + 1, self.launch)
        return newest + 1

    def _is_ours(self, attempt: int) -> bool:
        """Whether we claimed it, and a server that failed just then did not tell us; then we take the next one."""
        return attempt == self.memory.attempt and attempts.claimed_by(self.run, attempt) in ("", self.launch)

    def _spend_restart(self, cause: Failure) -> None:
        """Count a restart, record why, and end the job if a restart cannot help."""
        self.failures.append(cause)
        step = max(self.run.steps_committed(), self.memory.step if self.job.checkpoint.in_memory else -1)
        self.restarts_without_progress = 1 if step > self.last_step else self.restarts_without_progress + 1
        self.last_step = step
        left = self.job.agent.restarts - self.restarts_without_progress
        facts = asdict(cause)
        del facts["time"]
        self.run.record("failure", **facts, step=step, restarts_left=max(left, 0))
        if (reason := self._why_not(cause, left, step)) is not None:
            raise Ended(paragraph(cause, reason), self._exit_code(cause))
        older = ", or an older one that all nodes have" if self.job.nodes > 1 and step > 0 else ""
        outcome = f"Restarting from step {max(step, 0)}{older}; {left} restarts without progress are left."
        self.say(paragraph(cause, outcome))

    def _why_not(self, cause: Failure, left: int, step: int) -> str | None:
        """Why there is no restart any more; None: there is one. `left`: without progress; `step`: the newest kept."""
        total = self.job.agent.restarts_total
        if cause.code == WRONG_JOB:
            return "It is not retried."
        if cause.kind == "loss":
            return "train.on_nan=halt: it is not retried."
        if self.restarts_without_progress > 1 and cause.repeats(self.failures[-2]):
            return f"It failed twice in the same way, {cause.when}, and would fail again: it is not retried."
        if left < 0:
            return (
                f"Gave up after {self.restarts_without_progress - 1} restarts without progress (step {max(step, 0)})."
            )
        if len(self.failures) > total:
            return f"Gave up after agent.restarts_total={total} restarts, with progress in between (step {step})."
        return None

    def _exit_code(self, cause: Failure) -> int:
        """The code that a script chose; from 125 on they mean something to shells and engines."""
        chosen = cause.code == WRONG_JOB or (self.job.script and DONE < cause.code < 125)
        return cause.code if chosen else FAILED


def _unwritable(run: RunFolder, error: OSError, cause: Failure | None) -> str:
    """Why a run ends whose folder cannot be written now."""
    outcome = f"The run folder cannot be written: {error.strerror}."
    if cause is not None:
        return paragraph(cause, outcome)
    kind = classify(FAILED, "OSError", str(error), "", False)
    return f"[{kind}] {outcome} {KINDS[kind][0]}. Run folder: {run}"
