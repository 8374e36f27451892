"""How often a state is copied: as often as half a percent of the time allows."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from trainer.checkpoint import copies
from trainer.checkpoint.copies import Copies, Pace
from trainer.checkpoint.memory import MOMENTS, Memory


def test_copies_take_half_a_percent_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(copies.time, "perf_counter", lambda: clock[0])
    pace, count = Pace(), 0
    for step in range(1, 2000):
        clock[0] += 0.003
        if step % pace.every == 0:
            began, count = clock[0], count + 1
            clock[0] += 0.0004
            pace.took(step, began, 0.0004)
    assert pace.every == 32 and 0.0025 < count * 0.0004 / clock[0] < 0.0055


def test_what_it_takes_to_gather_a_state_counts() -> None:
    """Steps of 10 ms and a state that takes 10 ms to gather: half a percent is every 200 steps, rounded up to 256."""
    kept = Copies(Memory.make(), 1, 0, [], True, print)

    def gather() -> dict[str, Any]:
        time.sleep(0.01)
        return {"weight": torch.ones(1)}

    for step in (1, 2):
        assert kept.fill(kept.choose() or 0, MOMENTS * step, gather)
        kept.settle(False)
        time.sleep(0.01)
    kept.close()
    assert kept.pace.every >= 128
