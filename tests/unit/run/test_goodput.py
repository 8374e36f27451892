"""What restarts cost, as a run's events tell it."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.run.goodput import goodput


def event(time: float, name: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": name, **fields}


def attempt(number: int, start: float, first: int, last: int) -> list[dict[str, Any]]:
    """Steps of a second each, from the one after `first`, with a checkpoint after every tenth."""
    saved = [step for step in range(first + 2, last + 1) if step % 10 == 0]
    return [
        event(start, "attempt" if number == 0 else "restart", attempt=number),
        event(start, "training", attempt=number, step=first),
        event(start + 1, "first_step", attempt=number, step=first + 1),
        *(event(start + step - first, "checkpoint", attempt=number, step=step) for step in saved),
    ]


def test_without_a_restart_there_is_nothing_to_say() -> None:
    assert goodput([]) is None
    assert goodput(attempt(0, 0, 0, 50)) is None


def test_steps_that_are_done_again_and_the_time_to_start_count_as_lost() -> None:
    """Fifty steps of a second; ten of them twice, and a restart of ten seconds."""
    failure = event(30, "failure", kind="killed", at_step=30)
    found = goodput([*attempt(0, 0, 0, 29), failure, *attempt(1, 40, 20, 50)])
    assert found is not None
    assert (found.share, found.repeated) == (pytest.approx(49 / 69), 10)
    assert str(found) == "71.0% of the time went into steps that were kept; 10 were done again"


def test_while_nobody_asked_it_to_go_on_no_time_is_lost() -> None:
    failure = event(30, "failure", kind="killed", at_step=30)
    first = [*attempt(0, 0, 0, 29), failure, *attempt(1, 30, 30, 40), event(40, "ended", code=1)]
    found = goodput([*first, event(5000, "continued"), *attempt(2, 5000, 40, 50)])
    assert found is not None and found.share == 1.0
