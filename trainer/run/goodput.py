"""What restarts cost a run, from its events: the share of its time that went into steps which were kept."""

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from trainer.records import is_count
from trainer.run.event_files import Event
from trainer.run.history import restart_causes

TICKS = ("first_step", "checkpoint", "stopped", "done")
"""Events that come after a step, and say which."""


class Goodput(NamedTuple):
    """Of the time since the first step, without that in which the run waited for somebody to continue it."""

    share: float
    """As long as the steps that were kept take at the usual pace, of that time."""
    repeated: int
    """Steps that were done again, as far as somebody knew of them."""

    def __str__(self) -> str:
        return f"{self.share:.1%} of the time went into steps that were kept; {self.repeated} were done again"


def goodput(events: Sequence[Event]) -> Goodput | None:
    """None without a restart, and where too little is known of the pace."""
    ticks = [event for event in events if event["event"] in TICKS and is_count(event.get("step"))]
    pairs = [(one, two) for one, two in itertools.pairwise(ticks) if _is_stretch(one, two)]
    if not restart_causes(events) or not pairs:
        return None
    pace = statistics.median((two["time"] - one["time"]) / (two["step"] - one["step"]) for one, two in pairs)
    took = ticks[-1]["time"] - ticks[0]["time"] - _away(events, ticks[0]["time"])
    kept = (ticks[-1]["step"] - ticks[0]["step"]) * pace
    return Goodput(min(1.0, kept / took), _repeated(events)) if took > 0 else None


def _is_stretch(one: Event, two: Event) -> bool:
    """Whether one attempt made steps from here to there."""
    return one.get("attempt") == two.get("attempt") and two["step"] > one["step"] and two["time"] > one["time"]


def _away(events: Sequence[Event], since: float) -> float:
    """Seconds between an end of the run and its continuation."""
    pairs = itertools.pairwise(events)
    gaps = [two["time"] - one["time"] for one, two in pairs if two["event"] == "continued" and one["time"] >= since]
    return float(sum(gaps))


def _repeated(events: Sequence[Event]) -> int:
    known = repeated = 0
    for event in events:
        step = event.get("at_step" if event["event"] == "failure" else "step")
        if not is_count(step):
            continue
        if event["event"] == "training":
            repeated += max(0, known - step)
            known = step
        elif event["event"] in (*TICKS, "failure"):
            known = max(known, step)
    return repeated
