"""Which failures are followed by a restart: budgets, failures that are sure to repeat, runs that others own."""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.agent.failure import Failure
from trainer.agent.restarts import RestartPolicy
from trainer.agent.rounds import Ended
from trainer.checkpoint.memory import Memory
from trainer.config.job import Agent, Job
from trainer.errors import FAILED, JobError
from trainer.run import abilities, attempts
from trainer.run.folder import RunFolder

BUG = Failure(0, "host", 1, 5.0, FAILED, "user code", "ValueError: bad", "rank-1.log", cause="ValueError at bad.py:12",
              at_step=7, passing=False)  # fmt: skip


class Policy(RestartPolicy):
    """Of a run in a folder, which may make progress."""

    def __init__(self, folder: Path, **options: int) -> None:
        self.said: list[str] = []
        super().__init__(Job(task="a:B", agent=Agent(**options)), RunFolder(folder), self.said.append, Memory.make())
        self.round = 0
        self.fail()

    def fail(self, *failures: Failure) -> int:
        self.round += 1
        return self.next_attempt(self.round, list(failures))

    def save(self, step: int) -> None:
        (self.run.checkpoints / f"step-{step:09d}").mkdir(parents=True)


def test_the_same_exception_at_the_same_step_is_not_tried_a_third_time(tmp_path: Path) -> None:
    policy = Policy(tmp_path)
    assert policy.fail(BUG) == 1
    with pytest.raises(Ended, match=r"twice in the same way, after step 7, .* not retried") as end:
        policy.fail(replace(BUG, rank=0, time=9.0))
    assert end.value.code == FAILED
    assert "ValueError: bad (at bad.py:12)" in str(end.value)


@pytest.mark.parametrize(
    "other",
    [
        replace(BUG, cause="ValueError at bad.py:13"),
        replace(BUG, cause="KeyError at bad.py:12"),
        replace(BUG, at_step=8),
        replace(BUG, passing=True),
        replace(BUG, cause="", kind="killed"),
    ],
    ids=["another line", "another exception", "another step", "it may pass", "no exception"],
)
def test_all_others_have_the_budget_without_progress(tmp_path: Path, other: Failure) -> None:
    policy = Policy(tmp_path, restarts=3)
    policy.fail(BUG)
    policy.fail(other)
    policy.fail(BUG)
    with pytest.raises(Ended, match="Gave up after 3 restarts without progress"):
        policy.fail(replace(other, at_step=9))


def test_after_progress_it_may_be_another_one(tmp_path: Path) -> None:
    policy = Policy(tmp_path)
    policy.fail(BUG)
    policy.save(8)
    assert policy.fail(BUG) == 2


def test_restarts_with_progress_have_a_budget_too(tmp_path: Path) -> None:
    policy = Policy(tmp_path, restarts=1, restarts_total=4)
    for step in range(1, 5):
        policy.save(step)
        policy.fail(replace(BUG, at_step=step))
    policy.save(9)
    with pytest.raises(Ended, match=r"agent\.restarts_total=4 restarts"):
        policy.fail(replace(BUG, at_step=9))


def test_a_wrong_job_is_tried_once(tmp_path: Path) -> None:
    with pytest.raises(Ended, match="not retried"):
        Policy(tmp_path).fail(Failure(0, "host", 0, 1.0, 64, "config", "train.lr=x: is no number. Give one", "log"))


def test_a_launch_that_comes_between_two_looks_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tmp_path)
    newest = attempts.newest

    def overtaken(run: RunFolder) -> int:
        monkeypatch.setattr(attempts, "newest", newest)
        attempts.claim(run, before := newest(run) + 1)
        return before - 1

    monkeypatch.setattr(attempts, "newest", overtaken)
    with pytest.raises(Ended, match="another launch of this run goes on") as end:
        policy.fail(BUG)
    assert end.value.code == FAILED


def test_an_attempt_has_one_owner(tmp_path: Path) -> None:
    attempts.claim(RunFolder(tmp_path), 3)
    for attempt in (2, 3):
        with pytest.raises(attempts.StaleAttempt):
            attempts.claim(RunFolder(tmp_path), attempt)
    for name in ("²", "000009-copy", "notes"):  # what a person puts there is no attempt
        (tmp_path / "attempts" / name).touch()
    attempts.claim(RunFolder(tmp_path), 4)


@pytest.mark.parametrize("chosen, code", [(7, 7), (124, 124), (125, FAILED), (139, FAILED)])
def test_the_exit_code_of_a_script_is_its_own_unless_it_means_something_else(
    tmp_path: Path, chosen: int, code: int
) -> None:
    """To a shell or an engine, which would take it for their own."""
    policy = Policy(tmp_path, restarts=0)
    policy.job.task, policy.job.script = None, "train.py"
    with pytest.raises(Ended) as end:
        policy.fail(replace(BUG, code=chosen))
    assert end.value.code == code


def test_a_launch_that_was_replaced_does_not_go_on(tmp_path: Path) -> None:
    policy = Policy(tmp_path)
    attempts.claim(policy.run, 5)
    with pytest.raises(Ended, match="attempt 0 was replaced by attempt 5, which goes on"):
        policy.fail(BUG)


def test_a_folder_that_cannot_be_written_is_the_jobs_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tmp_path)
    policy.run = RunFolder(tmp_path / "file/run")
    (tmp_path / "file").touch()
    monkeypatch.setattr(policy, "attempt", None)
    with pytest.raises(JobError, match=r"runs='.*': cannot be written .*Give a writable"):
        policy.fail()


def test_a_disk_that_fails_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no file can be opened any more, which counts as such an error."""
    policy = Policy(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = os.open(tmp_path, os.O_RDONLY)

    def end() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    resource.setrlimit(resource.RLIMIT_NOFILE, (opened, before[1]))
    monkeypatch.setattr(abilities.time, "sleep", lambda seconds: end())
    try:
        assert policy.fail() == 1
        assert len(policy.said) == 1 and "Too many open files" in policy.said[0]
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened, before[1]))
        monkeypatch.setattr(abilities, "PATIENCE_S", 0.0)
        with pytest.raises(Ended, match="The run folder cannot be written: Too many open files"):
            policy.fail()
    finally:
        end()
        os.close(opened)


@pytest.mark.parametrize("name", ["open", "scandir"])
def test_a_claim_that_fails_when_it_is_there_already_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A server made the file and did not tell us, or fails a moment later: no other launch goes on, so we must."""
    policy = Policy(tmp_path)
    policy.run.failures.mkdir(exist_ok=True)
    fail_once(monkeypatch, name)
    assert policy.fail() == attempts.newest(policy.run) == policy.memory.attempt > 0
    assert policy.fail() == attempts.newest(policy.run)


def test_a_claim_that_another_launch_made_meanwhile_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our server did not answer for so long that we were replaced."""
    policy = Policy(tmp_path)
    fail_once(monkeypatch, "open", b"another")
    with pytest.raises(Ended, match="attempt 0 was replaced by attempt 1, which goes on"):
        policy.fail()


def fail_once(patch: pytest.MonkeyPatch, name: str, content: bytes = b"") -> None:
    """The next call of a function in `os` does what it should, and says that it failed."""
    real = getattr(os, name)

    def fail(*arguments: Any) -> None:
        patch.setattr(os, name, real)
        done = real(*arguments)
        if isinstance(done, int):
            os.write(done, content)
            os.close(done)
        raise OSError(errno.ESTALE, "Stale file handle")

    patch.setattr(os, name, fail)


def test_agents_that_were_killed_without_progress_use_up_the_budget(tmp_path: Path) -> None:
    """Where a platform makes new agents for ever, and node 0's is the one that dies, nobody else counts."""
    policy = Policy(tmp_path, restarts=3)
    policy.killed = 3, 1
    policy.fail()
    policy.killed = 4, 1
    with pytest.raises(Ended, match="agent of node 1 was killed 4 times, and no checkpoint") as end:
        policy.fail()
    assert end.value.code == FAILED
