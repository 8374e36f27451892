"""Copies of the state: what is written, or gone on from, is the state as it was, and no failure is silent."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import copies, files, writer
from trainer.checkpoint.keeper import Keeper
from trainer.checkpoint.memory import Memory
from trainer.checkpoint.writer import Order
from trainer.config.job import Checkpoints, Job
from trainer.parallel.base import Parallel
from trainer.run.attempts import StaleAttempt
from trainer.run.folder import RunFolder, committed, step_of
from trainer.wiring.rank import rank_wiring


class Disk:
    """A run folder whose disk takes what is committed once it is told to."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.path, self.ready, self.problem = path, threading.Event(), None
        commit = files.commit

        def wait_and_commit(*arguments: Any) -> Path:
            assert self.ready.wait(10)
            if self.problem is not None:
                raise self.problem
            return commit(*arguments)

        patch.setattr(writer.files, "commit", wait_and_commit)

    def order(self, step: int) -> Order:
        """A checkpoint here."""
        return Order(str(self.path), step, 0, {"metrics": {}}, 9, None)

    def saved(self) -> dict[int, float]:
        """The weight in each checkpoint."""
        folders = committed(self.path / "checkpoints")
        return {step_of(folder): float(files.read(folder, nothing)[0]["weight"][0]) for folder in folders}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Keeper]]:
    """Makes the keeper of the only rank; closes it in the end."""
    made: list[Keeper] = []
    for name in ("MUSTER_MEMORY", "MUSTER_WRITER", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def make(run: str = "run", **checkpoint: Any) -> Keeper:
        job = Job(device="cpu", parallel="single", checkpoint=Checkpoints(**checkpoint))
        made.append(Keeper(job, Parallel(job, rank_wiring()), RunFolder(Path(run)), 0, lambda: False, told.append))
        return made[-1]

    told.clear()
    yield make
    for each in made:
        each.close(nothing)


told: list[str] = []


def nothing() -> None:
    """No sign of life."""


def state(value: float, size: int = 1000) -> dict[str, Any]:
    """Of a model with a weight."""
    return {"model": {"weight": torch.full((size,), value)}, "position": {"step": 1}}


def test_what_is_written_is_the_state_at_its_step(disk: Disk, make: Callable[..., Keeper]) -> None:
    """Two saves do not wait for the disk, the third waits for the first."""
    kept, contents, beats = make(), state(0.0), []

    def beat() -> None:
        beats.append(1)
        disk.ready.set()

    for step in (1, 2, 3):
        contents["model"]["weight"].fill_(step)
        kept.save(disk.order(step), 4 * step, dict(contents), beat)
        assert bool(beats) == (step == 3)
    contents["model"]["weight"].fill_(0)
    kept.wait(nothing)
    assert disk.saved() == {1: 1.0, 2: 2.0, 3: 3.0}


def test_one_buffer_is_enough_while_the_disk_is_fast(disk: Disk, make: Callable[..., Keeper]) -> None:
    kept = make()
    disk.ready.set()
    for step in (1, 2, 3):
        kept.save(disk.order(step), 4 * step, state(step), nothing)
        kept.wait(nothing)
    assert [buffer.size > 0 for buffer in kept.copies.buffers] == [True, False]


@pytest.mark.parametrize("problem", [
    OSError(errno.ENOSPC, "No space left on device", "/x"), StaleAttempt("attempt 1 was replaced"), ValueError("odd"),
])  # fmt: skip
def test_a_failure_is_raised_once_and_the_next_save_goes_on(
    disk: Disk, make: Callable[..., Keeper], problem: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = make()
    disk.problem = problem  # type: ignore[assignment]
    disk.ready.set()
    kept.save(disk.order(1), 5, state(1), nothing)
    kind = type(problem) if not isinstance(problem, ValueError) else RuntimeError
    with pytest.raises(kind) as raised:
        kept.wait(nothing)
    assert str(problem) in str(raised.value)
    said = capfd.readouterr().err
    assert ("Traceback" in said) != isinstance(problem, StaleAttempt), "that is no mistake of anybody's"
    assert str(problem) in said
    disk.problem = None
    kept.wait(nothing)
    kept.save(disk.order(2), 9, state(2), nothing)
    kept.wait(nothing)
    assert disk.saved() == {2: 2.0}


def test_without_asynchronous_it_is_committed_at_once(disk: Disk, make: Callable[..., Keeper]) -> None:
    kept = make(asynchronous=False)
    disk.ready.set()
    kept.save(disk.order(1), 5, state(1), nothing)
    assert disk.saved() == {1: 1.0} and not told
    disk.problem = OSError("full")  # type: ignore[assignment]
    with pytest.raises(OSError, match="full"):
        kept.save(disk.order(2), 9, state(2), nothing)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_whoever_waits_for_the_disk_is_alive_but_not_for_ever(
    disk: Disk, make: Callable[..., Keeper], asynchronous: bool
) -> None:
    kept, beats = make(asynchronous=asynchronous), []
    assert kept.limit_s == 3000, "ten times agent.hang_timeout_s"
    kept.limit_s = 1.2
    with pytest.raises(TimeoutError, match="nothing was committed for 1 s, 10 times"):
        for step in (1, 2, 3):
            kept.save(disk.order(step), 4 * step, state(step), lambda: beats.append(1))
    assert beats and disk.saved() == {}
    with pytest.raises(TimeoutError) if asynchronous else contextlib.nullcontext():
        kept.close(nothing)
    disk.ready.set()
    kept.limit_s = 60.0


def test_writing_beside_a_training_gives_way_and_not_when_nothing_trains(
    disk: Disk, make: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, found, commit = make(), [], writer.files.commit

    def look(*arguments: Any) -> Path:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return commit(*arguments)

    monkeypatch.setattr(writer.files, "commit", look)
    disk.ready.set()
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    for step, urgent in enumerate((False, True, False)):
        kept.save(dataclasses.replace(disk.order(step), urgent=urgent), 4 * step, state(step), nothing)
    kept.wait(nothing)
    kept.close(nothing)
    assert found == [max(usual, writer.NICE), usual, max(usual, writer.NICE)]


def test_a_state_that_does_not_fit_is_saved_without_a_copy(
    disk: Disk, make: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "free_memory", lambda: 1 << 10)
    kept = make()
    disk.ready.set()
    for step in (1, 2):
        kept.save(disk.order(step), 4 * step, state(float(step), 10**6), nothing)
    assert disk.saved() == {1: 1.0, 2: 2.0}
    assert len(told) == 1 and "3 MiB are missing" in told[0]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_no_failure_while_memory_holds_the_state(
    disk: Disk, under_agent: tuple[Memory, Callable[..., Keeper]], asynchronous: bool
) -> None:
    """It is said once, and the next checkpoint is tried; at the end the newest must be on the disk."""
    kept, full = under_agent[1](asynchronous=asynchronous), OSError(errno.ENOSPC, "No space left on device")
    disk.ready.set()
    for step, problem in enumerate((full, full, None, full), 1):
        disk.problem = problem  # type: ignore[assignment]
        kept.save(disk.order(step), 4 * step + 1, state(step), nothing)
        kept.await_others(nothing)  # it shall meet this disk, not that of the next save
    assert disk.saved() == {3: 3.0} and "No space left on device" in told[0]
    with pytest.raises(OSError, match="No space left"):
        kept.wait(nothing)
    assert len(told) == 2


class Note:
    """Something of the user's."""


def test_classes_that_the_user_allows_are_written(
    disk: Disk, make: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a thread: the agent's process knows none of them."""
    memory = Memory.make()
    for name, value in {**memory.environment(), "MUSTER_WRITER": str(tmp_path / "nobody listens")}.items():
        monkeypatch.setenv(name, value)
    kept = make()
    disk.ready.set()
    with torch.serialization.safe_globals([Note]):
        kept.save(disk.order(1), 5, {**state(1.0), "note": Note()}, nothing)
        kept.wait(nothing)
        assert disk.saved() == {1: 1.0}


@pytest.fixture
def under_agent(make: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch) -> tuple[Memory, Callable[..., Keeper]]:
    """The memory of an agent, and what makes ranks of it, one after the other."""
    memory = Memory.make()
    for name, value in memory.environment().items():
        monkeypatch.setenv(name, value)

    return memory, make


def test_the_next_attempt_goes_on_from_the_newest_copy(under_agent: tuple[Memory, Callable[..., Keeper]]) -> None:
    memory, start = under_agent
    first = start()
    for step in (1, 2):
        first.boundary(4 * step + 1, lambda step=step: state(step))  # type: ignore[misc]
    first.close(nothing)
    assert memory.step == 2
    found = start().recover(2, nothing)
    assert found is not None and float(found["model"]["weight"][0]) == 2.0
    found["model"]["weight"].fill_(9)  # it is a copy: an optimizer goes on with such tensors
    assert float(start().recover(-1, nothing)["model"]["weight"][0]) == 2.0  # type: ignore[index]
    assert start().recover(3, nothing) is None, "the disk is newer"
    assert start(in_memory=False).recover(-1, nothing) is None
    assert start("another session of the script").recover(-1, nothing) is None


def test_a_copy_that_cannot_be_read_is_not_tried_again(under_agent: tuple[Memory, Callable[..., Keeper]]) -> None:
    memory, start = under_agent
    first = start()
    first.boundary(5, lambda: {"odd": threading.Event})  # not what weights_only reads
    first.close(nothing)
    assert memory.step == 1
    assert start().recover(0, nothing) is None
    assert memory.sealed() == {} and "could not be read" in told[-1]


def test_a_copy_that_was_begun_leaves_the_other(under_agent: tuple[Memory, Callable[..., Keeper]]) -> None:
    memory, start = under_agent
    rank = start()
    rank.boundary(5, lambda: state(1))
    rank.boundary(9, lambda: state(2))
    child = os.fork()
    if not child:
        rank.copies.pace.every = 1
        rank.copies.buffers[0].write = lambda *_: os._exit(7)  # type: ignore[method-assign]
        rank.boundary(13, lambda: state(3))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert memory.step == 2


def test_what_is_being_saved_is_not_filled_again(disk: Disk, under_agent: tuple[Memory, Callable[..., Keeper]]) -> None:
    """Also by the next attempt: it takes the other buffer, and waits before it looks at the disk."""
    memory, start = under_agent
    first = start()
    first.save(disk.order(1), 5, state(1), nothing)
    second = start()
    for step in (2, 3):
        second.boundary(4 * step + 1, lambda step=step: state(step))  # type: ignore[misc]
    assert sorted(seal.step for seal in memory.sealed().values()) == [1, 3]
    beats: list[int] = []

    def beat() -> None:
        beats.append(1)
        disk.ready.set()

    second.close(nothing)
    start().await_others(beat)
    assert beats and disk.saved() == {1: 1.0}
