"""How far a run is and what it measured last, from the ends of its files, which may have millions of lines."""

from collections.abc import Sequence
from typing import Any

from trainer.records import is_count, is_number, parse_lines, read_end, read_json, read_lines
from trainer.run.event_files import Event
from trainer.run.folder import RunFolder, last_event

END = 64 << 10
"""What is read of the metrics, from their end."""
LONG_END = 1 << 20
"""What is read for an average, and where an evaluation is looked for that has no file of its own."""


def newest_lines(run: RunFolder, events: Sequence[Event]) -> list[dict[str, Any]]:
    """What the newest training logged lately: a stale attempt may have written the last lines."""
    training = last_event(events, "training") or {}
    newest = read_lines(run.metrics, END)
    return [line for line in newest if _is_since(line, training)]


def newest_step(lines: Sequence[dict[str, Any]], events: Sequence[Event]) -> int | None:
    """The last step that is known to be done in the newest training, of which these are the lines; None before it."""
    training = last_event(events, "training") or {}
    since = events[events.index(training) :] if training else events
    steps = [*(event for event in since if event["event"] in ("training", "checkpoint", "stopped")), *lines]
    return max((line["step"] for line in steps if is_count(line.get("step"))), default=None)


def pace(lines: Sequence[dict[str, Any]]) -> float | None:
    """Steps in a second, over all lines of one training; None where they tell too little."""
    known = [line for line in lines if is_count(line.get("step")) and is_number(line.get("time"))]
    if len(known) < 2 or known[-1]["time"] <= known[0]["time"] or known[-1]["step"] <= known[0]["step"]:
        return None
    return float((known[-1]["step"] - known[0]["step"]) / (known[-1]["time"] - known[0]["time"]))


def _is_since(line: dict[str, Any], training: Event) -> bool:
    """Whether a line of the metrics belongs to this training: a restart goes back. Older versions name no attempt."""
    if "attempt" in line and "attempt" in training:
        return bool(line["attempt"] == training["attempt"])
    when = line.get("time")
    return is_number(when) and bool(when >= training.get("time", 0))


def last_evaluation(run: RunFolder) -> dict[str, Any]:
    """What the last evaluation measured; empty before the first."""
    found = read_json(run.evaluation)
    if found is None:  # of an older version: it is among its metrics, if not too far from their end
        lines = [line for line in read_end(run.metrics, LONG_END).split(b"\n") if b'"evaluation"' in line]
        found = next(iter(parse_lines(lines[-1:])), {})
    return measured(found)


def measured(line: dict[str, Any]) -> dict[str, Any]:
    """The values in a line of the metrics."""
    own = ("kind", "step", "attempt", "time")
    return {name: value for name, value in line.items() if name not in own and is_number(value)}


def mean_speed(run: RunFolder) -> float | None:
    """The samples/s of many steps before the end, whichever attempts did them; None where nothing was logged."""
    lines = read_lines(run.metrics, LONG_END)
    speeds = [line["samples_per_s"] for line in lines if is_number(line.get("samples_per_s"))]
    logged = [speed for speed in speeds if speed > 0]  # each of as many steps
    return len(logged) / sum(1 / speed for speed in logged) if logged else None
