"""Events, metrics and times in words for a terminal. What they mean is in `history` and `progress`."""

from typing import Any

from trainer.errors import WRONG_JOB
from trainer.records import is_count
from trainer.run.event_files import Event
from trainer.run.progress import measured

TEXTS = {
    "training": "training {extent}: {parallel}, {ranks} on {device}",
    "failure": "{who}node {node} failed [{kind}]: {message:.300}{place}",
    "restart": "restarting: attempt {attempt}", "resume": "resumed from {folder}", "requeued": "requeued",
    "checkpoint_refused": "checkpoint refused: {problem}", "pending": "pending: {reason}",
    "agent_lost": "the agent of node {node} was lost (exit {code}); starting it again",
    "stopped": "stopped at step {step} with a checkpoint",
    "note": "NOTE: {message}", "notice": "WARNING: {message}", "nonfinite_loss": "the loss of step {step} is {loss}",
}  # fmt: skip


def describe(event: Event) -> str:
    """An event in words, empty for those that only machines read, and for a refusal: the end of the run is about it."""
    if event["event"] == "failure" and event.get("code") == WRONG_JOB:
        return ""
    who = "" if event.get("rank") is None else f"rank {event['rank']} on "
    place = f" (at {where})" if (where := event.get("cause", "").partition(" at ")[2]) else ""
    words = {"who": who, "place": place, "extent": _extent(event), "ranks": count(event.get("world_size"), "rank")}
    return TEXTS.get(event["event"], "").format_map({**event, **words})


def _extent(training: Event) -> str:
    """From where to where it trains; scripts need not tell."""
    step, steps = training.get("step"), training.get("steps")
    of, in_epochs = epoch(training, steps), epoch(training, step)
    if step:
        return f"from step {step}" + (f" to {steps}" if steps else "") + (f" (epoch {in_epochs} of {of})" if of else "")
    return (f"{steps} steps" if steps else "") + (f" ({count(of, 'epoch')})" if of else "")


def epoch(training: Event, step: Any) -> int | None:
    """The epoch that a step belongs to, of which the first is 1; None where nobody knows."""
    each = training.get("steps_per_epoch")
    return -(-step // each) if is_count(each) and each and is_count(step) and step else None


def count(number: Any, what: str) -> str:
    """Such as `1 rank`, `2 ranks`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def number(value: float) -> str:
    """A value with about as many digits as say something, in few columns."""
    size = abs(value)
    return (
        f"{value:,.0f}"
        if 1000 <= size < 1e9
        else f"{value:.4f}"
        if 0.001 <= size < 1000 or not size
        else f"{value:.2e}"
    )


def numbers(values: dict[str, Any]) -> list[str]:
    """Each value with its name."""
    return [f"{name} {number(value)}" for name, value in values.items()]


def values_of(line: dict[str, Any]) -> tuple[list[str], str]:
    """What a line of `metrics.jsonl` measured, and the speed of the training, in words."""
    found = measured(line)
    speed = f"{found.pop('samples_per_s'):,.0f} samples/s" if "samples_per_s" in found else ""
    if "mean_loss" in found:  # of a task
        found = {"loss": found["mean_loss"]}
    return numbers(found), speed


def duration(seconds: float) -> str:
    """A time in one unit, such as `95 s`, `42 min`, `2.7 h`, `3 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            exact = unit != "min" and seconds < 10 * size
            return f"{seconds // (size / 10) / 10:g} {unit}" if exact else f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
