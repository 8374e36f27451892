"""Mistakes in the use of a session: each is named in one line, with its remedy, and nothing is tried again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import session_mistakes
from ranks import evaluations, order_of_samples
from session_mistakes import call
from states import read_state, steps_saved
from torch import nn

from trainer.errors import DONE, STOPPED, WRONG_JOB

MISTAKES: list[tuple[Callable[..., None], int, str]] = [
    (session_mistakes.tracks_late, 1, "track"),
    (session_mistakes.tracks_a_number, 1, "state_dict"),
    (session_mistakes.updates_too_often, 1, "updates"),
    (session_mistakes.leaves_early, 2, "left"),
    (session_mistakes.loops_in_a_loop, 1, "loop"),
    (session_mistakes.loops_after_a_loop, 1, "same epoch"),
    (session_mistakes.logs_a_list, 1, "rate"),
    (session_mistakes.forgets_with, 1, "with muster.Session"),
    (session_mistakes.shares_weights, 2, "session.wrap='0.weight'"),
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


def test_a_stop_that_is_caught(tmp_path: Path) -> None:
    """It is a stop all the same, and the run goes on with the rate of a schedule that was tracked last."""
    runs = [call(session_mistakes.catches_all, tmp_path) for _ in range(2)]
    assert [run.code for run in runs] == [STOPPED, DONE]
    said = [line for run in runs for line in run.output().splitlines() if line.startswith("rate")]
    assert said == [f"rate {1 + step}" for step in range(6)]


def test_a_loop_after_one_that_was_left(tmp_path: Path) -> None:
    """It begins with an epoch of its own."""
    assert call(session_mistakes.leaves_a_loop_for_another, tmp_path).code == DONE
    first, second = order_of_samples(tmp_path / "run").values()
    assert len(first) == 8 and sorted(second) == list(range(5))


def test_a_loop_that_is_left_after_an_update(tmp_path: Path) -> None:
    """No sample of it comes again."""
    runs = [call(session_mistakes.breaks_after_an_update, tmp_path) for _ in range(2)]
    assert [run.code for run in runs] == [DONE, DONE], runs[0].output() + runs[1].output()
    first, second = order_of_samples(tmp_path / "run").values()
    assert sorted(first) == list(range(12)) and len(second) == 4 and steps_saved(tmp_path / "run")[-1] == 4


def test_each_micro_batch_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    """Or dropout would leave out the same in all of an update; and each rank has its own."""
    said = call(session_mistakes.draws, tmp_path, 2).output().splitlines()
    drawn = [line for line in said if line.startswith("drawn")]
    assert len(drawn) == len(set(drawn)) == 12


def test_all_ranks_evaluate_with_the_statistics_that_a_checkpoint_has(tmp_path: Path) -> None:
    assert call(session_mistakes.evaluates_statistics, tmp_path, 2).code == DONE
    model = nn.BatchNorm1d(1)
    model.load_state_dict(read_state(tmp_path / "run")["model"])
    expected = model.eval()(session_mistakes.numbers().tensors[0]).mean().item()
    assert evaluations(tmp_path / "run")[-1]["output"] == pytest.approx(expected, abs=1e-6)
