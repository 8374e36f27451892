"""Who builds first when ranks start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.reporting.heartbeat import Pulse
from trainer.task import Task
from trainer.training.first_rank import build_in_turn


class Plain(Task):
    """Without `prepare`."""

    model = train_dataset = eval_dataset = loss = lambda *_: None  # type: ignore[assignment]


class Prepares(Plain):
    """With it."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note

    def prepare(self) -> None:
        self.note("prepares")


class Rank:
    """What the ranks of two nodes with two ranks each know of each other, as threads."""

    def __init__(self, rank: int, barrier: threading.Barrier) -> None:
        self.rank, self.local_rank, self.barrier = rank, rank % 2, barrier

    def meet(self) -> None:
        self.barrier.wait(10)


def play(prepares: bool, ranks: int = 4) -> list[set[str]]:
    """What is done between two meetings."""
    done: list[set[str]] = [set()]
    barrier = threading.Barrier(ranks, lambda: done.append(set()))

    def work(rank: int) -> None:
        def note(what: str) -> None:
            done[-1].add(f"{rank} {what}")

        def make() -> Task:
            note("makes")
            return Prepares(note) if prepares else Plain()

        place: Any = Rank(rank, barrier)
        assert build_in_turn(place, Pulse(rank % 2), make, lambda task: note("builds") or rank) == rank

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done[:-1]


def test_a_task_is_built_by_one_rank_of_a_node_before_the_others() -> None:
    assert play(prepares=False) == [
        {"0 makes", "0 builds"}, {"2 makes", "2 builds"}, {"1 makes", "1 builds", "3 makes", "3 builds"},
    ]  # fmt: skip


def test_one_that_prepares_is_built_by_all_at_once() -> None:
    last = {f"{rank} {what}" for rank in range(4) for what in ("makes", "builds")}
    assert play(prepares=True) == [{"0 makes", "0 prepares"}, {"2 makes", "2 prepares"}, last]


def test_a_node_that_is_prepared_is_not_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSTER_HEARTBEAT", str(tmp_path / "heartbeat"))
    assert play(prepares=True, ranks=2)[0] == {"0 makes", "0 prepares"}
    last = {"0 makes", "0 builds", "1 makes", "1 builds"}
    assert play(prepares=True, ranks=2) == [set(), set(), last]
