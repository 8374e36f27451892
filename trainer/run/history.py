"""What became of all attempts of a run, from its events and logs: restarts with their causes, time, why it ended."""

from collections import Counter
from collections.abc import Sequence

from trainer.errors import STOPPED, WRONG_JOB
from trainer.records import is_count, read_json
from trainer.run.event_files import Event
from trainer.run.folder import RunFolder, last_event
from trainer.run.log_tail import last_lines

ENDS = ("failure", "stopped", "ended", "done", "agent_lost", "requeued")
"""Events that end a stretch of training, when it ends."""
BEGINNINGS = ("continued", "wired", "attempt", "restart", "training")
"""Events before which one has ended, some time after its own last event: all its processes were killed."""


def restart_causes(events: Sequence[Event]) -> list[str]:
    """Why the run was started again, once for each time; a continuation that somebody asked for does not count."""
    causes, pending = [], ""
    for event in events:
        kind = event["event"]
        if kind == "failure":  # of one of several nodes it is known already that its agent was lost
            pending = pending if pending and event.get("kind") == "peer lost" else _cause(event)
        elif kind == "agent_lost":
            pending = "agent lost"
        elif kind == "requeued" or (kind == "wired" and event.get("node") == 0 and _is_later(event)):
            pending = pending or "requeued"
        elif kind == "continued":
            pending = ""
        elif kind in ("attempt", "restart"):
            causes += [pending] if pending else []
            pending = ""
    return causes


def _is_later(wired: Event) -> bool:
    """Whether an agent began in a later launch than the first one."""
    launch = wired.get("launch")
    return is_count(launch) and launch > 0


def _cause(event: Event) -> str:
    return str(event.get("cause") or event.get("kind") or "unknown")


def agents_killed(events: Sequence[Event]) -> tuple[int, int]:
    """How often, and on which node, agents ended without a word since the run was submitted or saved a checkpoint.

    Of several nodes it is the one where that happened most often.
    """
    killed: Counter[int] = Counter()
    living: set[int] = set()
    for event in events:
        kind, node = event["event"], event.get("node")
        node = node if is_count(node) else None
        if kind in ("submitted", "continued", "done"):
            killed.clear()
            living.clear()
        elif kind == "checkpoint":
            killed.clear()
        elif kind == "ended" and node is not None:
            living.discard(node)
        elif kind == "wired" and node is not None:
            killed[node] += node in living
            living.add(node)
    [(node, times)] = killed.most_common(1) or [(0, 0)]
    return times, node


def restarts_text(events: Sequence[Event]) -> str:
    """Such as "7: ValueError at cells/bad.py:12 (7x)", the most frequent cause first; empty without a restart."""
    causes = restart_causes(events)
    counted = ", ".join(f"{cause} ({times}x)" for cause, times in Counter(causes).most_common())
    return f"{len(causes)}: {counted}" if causes else ""


def training_times(events: Sequence[Event], now: float | None = None) -> list[float]:
    """Seconds that each attempt trained for, which reached its loop; until `now`, if the last one still trains."""
    times: list[float] = []
    began = last = None
    for event in events:
        name, time = event["event"], event["time"]
        if began is not None and name in (*ENDS, *BEGINNINGS):
            times.append((last if name in BEGINNINGS else time) - began)
            began = None
        began = time if name == "training" else began
        last = time
    return times if began is None or now is None else [*times, max(0.0, now - began)]


def why_ended(run: RunFolder, events: Sequence[Event]) -> str:
    """Why the run ended, as its agents say, in one line; empty when none of them said so since it was submitted."""
    recent = _recent(events)
    said = [read_json(run.failure) or {}, *(event for event in reversed(recent) if event["event"] == "ended")]
    # What is wrong with the job explains why others failed; who was stopped explains nothing.
    rank = {WRONG_JOB: 0, STOPPED: 2}
    said = [each for each in said if each.get("reason")]
    said.sort(key=lambda each: rank.get(code, 1) if is_count(code := each.get("code")) else 1)
    return str(said[0]["reason"]) if said else ""


def likely_end(run: RunFolder, events: Sequence[Event]) -> str:
    """Why the run may have ended, where nobody could say: an agent that was lost, else the end of a log."""
    recent = _recent(events)
    lost = last_event(recent, "agent_lost")
    replaced = lost and any(e["event"] == "wired" and e.get("node") == lost.get("node") for e in _after(recent, lost))
    if lost is not None and not replaced:
        code = lost.get("code")
        how = f"ended by signal {-code}" if isinstance(code, int) and code < 0 else f"exit {code}"
        return f"the agent of node {lost.get('node')} was lost ({how}), more often than agent.restarts allows"
    since = recent[0]["time"] if recent else 0.0
    for log in (*sorted(run.logs.glob("node-*.log")), *sorted(run.logs.glob("s*.*"))):  # of Slurm, the supervisor
        lines = last_lines(log).split("\n") if log.stat().st_mtime >= since else []
        lines = [line.strip() for line in lines if line.strip()]
        wrong = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        if lines:
            return f"{(wrong or lines)[-1]:.500} (the end of {log})"
    return ""


def _after(events: Sequence[Event], event: Event) -> Sequence[Event]:
    return events[next(index for index, other in enumerate(events) if other is event) + 1 :]


def _recent(events: Sequence[Event]) -> list[Event]:
    """The events since the run was submitted the last time."""
    begins = [index for index, event in enumerate(events) if event["event"] in ("submitted", "continued")]
    return list(events[begins[-1] :] if begins else events)
