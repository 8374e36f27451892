"""Mistakes in the use of a session: each is named in one line, with its remedy, and nothing is tried again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import session_mistakes
from ranks import order_of_samples
from session_mistakes import call

from trainer.errors import STOPPED, WRONG_JOB

MISTAKES: list[tuple[Callable[..., None], int, str]] = [
    (session_mistakes.tracks_late, 1, "track"),
    (session_mistakes.tracks_a_number, 1, "state_dict"),
    (session_mistakes.updates_too_often, 1, "updates"),
    (session_mistakes.leaves_early, 2, "left"),
    (session_mistakes.loops_in_a_loop, 1, "loop"),
    (session_mistakes.misspells, 1, "checkpoint.every_steps"),
    (session_mistakes.misspells_a_section, 1, "sede"),
]


@pytest.mark.parametrize("mistake, ranks, words", MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_a_mistake(tmp_path: Path, mistake: Callable[..., None], ranks: int, words: str) -> None:
    run = call(mistake, tmp_path, ranks)
    said = run.output(ranks - 1)
    assert run.codes[-1] == WRONG_JOB and all(run.codes), run.output()
    assert words in said and "Traceback" not in said and said.count("ERROR: ") == 1, said


def test_data_of_another_length(tmp_path: Path) -> None:
    """In the middle of an epoch: which samples were used already cannot be told."""
    assert call(session_mistakes.stops, tmp_path).code == STOPPED
    run = call(session_mistakes.stops, tmp_path, 1, 15)
    assert run.code == WRONG_JOB and "15 samples" in run.output() and "12" in run.output()
    assert call(session_mistakes.calm, tmp_path).code == 0
    assert sorted(order_of_samples(tmp_path / "run")[0]) == list(range(12))
