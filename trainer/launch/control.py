"""What can be asked of a run that is there: its state, its logs, to stop, to come back. Apart from parsing."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import JobError
from trainer.launch.platform import Platform, State, find_platform
from trainer.launch.runs import last_event, list_runs
from trainer.records import read_json, read_lines, record_event, write_json
from trainer.run.folder import open_run
from trainer.run.log_tail import Tail


def state_of(run: Path) -> tuple[dict[str, Any] | None, Callable[[], State]]:
    """The handle of a run, and how to ask for its state: again of the same platform, which may keep an answer."""
    handle = read_json(run / "handle.json")
    if handle is None:
        return None, lambda: _by_events(run)
    return handle, partial(find_platform(handle["platform"]).state, run, handle)


def _submitted(run: Path) -> tuple[Platform, dict[str, Any]]:
    """The platform and the handle of a run that has not ended."""
    handle = read_json(run / "handle.json")
    if handle is None:
        raise JobError("RUN", str(run), "was not submitted by muster", "It has no handle.json")
    platform = find_platform(handle["platform"])
    word = platform.state(run, handle).word
    if word in ("done", "failed", "stopped", "cancelled"):  # of a lost one the platform itself knows more
        raise JobError("RUN", str(run), f"is not running: it is {word}", "`muster run` continues it")
    return platform, handle


def status(run_path: str) -> dict[str, Any]:
    """Everything that is known about a run."""
    run = open_run(run_path)
    handle, ask = state_of(run)
    state = ask()
    events = read_lines(run / "events.jsonl")
    training = last_event(events, "training") or {}
    metrics = read_lines(run / "metrics.jsonl")
    evaluated = [line for line in metrics if line["kind"] == "evaluation"]
    attempts = last_event(events, "attempt", "restart") or {}
    failure = read_json(run / "failure.json") or {}
    ended = last_event(events, "ended") or {}
    running = state.word in ("running", "pending", "done")
    skip = ("kind", "step", "attempt", "time")
    return {
        "run": str(run), "platform": handle["platform"] if handle else None, "state": state.word,
        "reason": state.reason or ("" if running else failure.get("reason") or ended.get("reason") or ""),
        "code": state.code, "step": _newest_step(events, metrics), "steps": training.get("steps"),
        "attempt": attempts.get("attempt"), "handle": handle,
        "metrics": {k: v for k, v in evaluated[-1].items() if k not in skip} if evaluated else {},
    }  # fmt: skip


def _newest_step(events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> int | None:
    """The last step that anything tells of, since the training last began: a restart goes back."""
    begun = (last_event(events, "training") or {}).get("time", 0)
    told = [event for event in events if event["event"] in ("training", "checkpoint", "stopped")] + metrics
    return max((line["step"] for line in told if line["time"] >= begun), default=None)


def _by_events(run: Path) -> State:
    """The state of a run that no `muster submit` started, from what its ranks wrote."""
    event = last_event(read_lines(run / "events.jsonl"), "done", "ended", "training")
    if event is None:
        return State("pending")
    if event["event"] == "done":
        return State("done", code=0)
    if event["event"] == "training":
        return State("running", "by its own records: no platform was asked")
    return State("stopped" if event["code"] == 75 else "failed", event["reason"], event["code"])


def status_text(found: dict[str, Any]) -> str:
    """A status for people."""
    lines = [f"{found['state']}: {found['run']}"]
    if found["steps"]:
        lines.append(f"step {found['step']} of {found['steps']}, attempt {found['attempt']}")
    if found["metrics"]:
        lines.append("  ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items()))
    if found["reason"]:
        lines.append(found["reason"])
    return "\n".join(lines)


def logs(run_path: str, rank: int | None, following: bool) -> None:
    """Print one rank's log, or those of all agents; go on while the run lives when `following`."""
    run = open_run(run_path)
    folder = run / "logs"
    _, ask = state_of(run)
    pattern = "node-*.log" if rank is None else f"rank-{rank}.log"
    tails: dict[Path, Tail] = {}
    while True:
        word = ask().word  # in any case: where nodes write on a side of their own, this copies their logs here
        for path in sorted(folder.glob(pattern)) or sorted(folder.glob("rank-*.log" if rank is None else pattern)):
            if path not in tails:
                tails[path] = Tail(path)
                tails[path].offset = 0
            tails[path].copy()
        if not following or word not in ("pending", "running"):
            break
        time.sleep(0.2)
    if rank is not None and not tails:
        raise _no_log(run, rank)


def _no_log(run: Path, rank: int) -> JobError:
    """Say where a rank's log lies instead: its run folder may be on the nodes' side, where alone events are then."""
    here = sorted(path.stem for path in (run / "logs").glob("*-*.log"))
    remedy = f"There are {', '.join(here) or 'none yet'}"
    if any(name.startswith("node-") for name in here) and not last_event(read_lines(run / "events.jsonl"), "wired"):
        remedy += f"; it lies where the nodes have their run folder, as {run.name}/logs/rank-{rank}.log"
    return JobError("--rank", rank, "has no log here", remedy)


def cancel(run_path: str) -> None:
    """Stop for good."""
    run = open_run(run_path)
    platform, handle = _submitted(run)
    platform.cancel(run, handle)
    record_event(run, "cancel_requested")
    write_json(run / "handle.json", handle | {"cancelled": True})


def preempt(run_path: str) -> None:
    """Stop and come back."""
    run = open_run(run_path)
    platform, handle = _submitted(run)
    platform.preempt(run, handle)
    record_event(run, "preempt_requested")


def list_all(runs: Path) -> list[dict[str, Any]]:
    """The status of each run of a folder."""
    return [status(str(run)) for run in list_runs(runs)]


def list_text(found: list[dict[str, Any]]) -> str:
    """A table for people."""
    if not found:
        return "no runs"
    return "\n".join(
        f"{item['state']:10} {item['platform'] or '-':10} "
        f"step {item['step'] or 0}/{item['steps'] or '?':<8} {item['run']}"
        for item in found
    )
