"""What can be asked of a run: its status, its logs, to stop, to come back. Parsing the arguments is in `cli`."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import DONE, FAILED, STOPPED, JobError
from trainer.launch.handle import read_handle
from trainer.launch.moved import copied_from
from trainer.launch.platform import AnyPlatform, JobStatus, Phase, platform_of
from trainer.launch.waiting import is_waiting, waited
from trainer.records import NOT_OURS, is_count, write_json
from trainer.run.descriptions import describe, duration, epoch, numbers, values_of
from trainer.run.event_files import Event
from trainer.run.folder import RunFolder, last_event
from trainer.run.goodput import goodput
from trainer.run.history import likely_end, restart_causes, restarts_text, training_times, why_ended
from trainer.run.line_file import warn
from trainer.run.log_tail import Tail, nobody_reads
from trainer.run.named import find_any, find_run
from trainer.run.ownership import check_owner, foreign
from trainer.run.progress import last_evaluation, measured, newest_lines, newest_step, pace
from trainer.run.summary import separate_ranks
from trainer.run.sweep import read_sweep


def status_of(run: RunFolder) -> tuple[dict[str, Any] | None, Callable[[], JobStatus]]:
    """The handle of a run, and a function that asks for its status; its platform may use an answer again."""
    handle = read_handle(run)
    if handle is None:
        return None, partial(by_events, run)
    if original := copied_from(run, handle):
        reason = f"a copy of {original}, made before that run had ended; `muster run` continues the copy on its own"
        return None, partial(_unless_ended, run, JobStatus(Phase.LOST, reason))
    platform = platform_of(handle)
    if platform.copies_logs and (problem := foreign(run)):
        return None, partial(_unless_ended, run, JobStatus(Phase.UNKNOWN, problem))  # who wrote it may name any job
    return handle, partial(platform.status, run, handle)


def _submitted(given: str | RunFolder) -> tuple[RunFolder, AnyPlatform, dict[str, Any]]:
    """A run that has not ended, its platform and its handle."""
    run = find_run(given)
    check_owner(run)
    handle = read_handle(run)
    if handle is None:
        raise JobError("RUN", str(run), "was not submitted by muster", "Stop it with its platform's own tools")
    if original := copied_from(run, handle):
        raise JobError("RUN", str(run), f"is a copy of {original}", "Give the folder that it was copied from")
    platform = platform_of(handle)
    now = platform.status(run, handle)
    if not now.is_active and now.phase != Phase.LOST:  # the platform itself explains what became of a lost one
        raise JobError("RUN", str(run), f"is not running: it is {now.phase}", "`muster run` continues it")
    return run, platform, handle


def status(given: str | RunFolder) -> dict[str, Any]:
    """Everything that is known about a run. Raises JobError: it is none, or somebody else wrote into its records."""
    run = find_run(given)
    try:
        return _status(run)
    except JobError:
        raise
    except NOT_OURS as error:
        problem, remedy = f"its records cannot be read: {error!r}", "Look into exit.json, and into the folder events"
        raise JobError("RUN", str(run), problem, remedy) from None


def _status(run: RunFolder) -> dict[str, Any]:
    handle, ask = status_of(run)
    now = ask()
    good = now.is_active or now.phase == Phase.DONE
    events = run.read_main_events() if good else run.read_events()
    training, state, reason = last_event(events, "training") or {}, now.phase, now.reason
    if state == Phase.RUNNING and (last := last_event(events, "pending", "wired")) and last["event"] == "pending":
        state, reason = Phase.PENDING, reason or str(last.get("reason", ""))
    lines = newest_lines(run, events)
    step, steps = newest_step(lines, events), training.get("steps")
    told = now.progress.get("step")
    is_behind = step is None or (is_count(told) and told > step)  # what was pulled may be older than what was printed
    step = told if is_behind else step
    values = [last_evaluation(run), now.progress.get("metrics", {})]
    values = values[::-1] if is_behind else values
    steps = steps if is_count(steps) else now.progress.get("steps")
    attempts = now.progress | (last_event(events, "attempt", "restart") or {})
    share = goodput(events)
    note = separate_ranks(run) if now.phase == Phase.DONE else ""
    reason = reason or (note if good else why_ended(run, events) or likely_end(run, events))
    return {
        "run": str(run), "platform": handle["platform"] if handle else None, "state": state,
        "reason": reason, "restarts": len(restart_causes(events)), "restarts_text": restarts_text(events),
        "goodput": round(share.share, 4) if share else None, "goodput_text": f"goodput {share}" if share else "",
        "waiting": waited(run) if is_waiting(now) or state == Phase.PENDING else "",
        "code": now.code, "step": step, "steps": steps,
        "attempt": attempts.get("attempt"), "handle": handle,
        "metrics": values[0] or values[1],
        "epoch": epoch(training, step), "epochs": epoch(training, steps),
        **_times(now, events, lines, step, steps), "last_failure": _last_failure(events),
        "place": platform_of(handle).called(handle) if handle else "",
    }  # fmt: skip


def _times(
    now: JobStatus, events: Sequence[Event], lines: Sequence[dict[str, Any]], step: Any, steps: Any
) -> dict[str, Any]:
    """When it was submitted, for how long it trained in all attempts, how fast, for how long still; its newest values.

    None for what is not known.
    """
    trains = now.phase == Phase.RUNNING
    logged = [line for line in lines if line.get("kind") == "train"]
    times, speed = training_times(events, time.time() if trains else None), pace(logged)
    left = (steps - step) / speed if trains and speed and is_count(step) and is_count(steps) and steps else None
    since = logged[-1]["time"] if left is not None else 0.0
    return {
        "submitted": events[0]["time"] if events else None,
        "elapsed_s": round(sum(times), 1) if times else None,
        "left_s": None if left is None else round(max(0.0, left - (time.time() - since)), 1),
        "train": measured(logged[-1]) if logged else {},
    }


def _last_failure(events: Sequence[Event]) -> str:
    """The newest first cause of the end of an attempt, and the step at which that was."""
    event = last_event(events, "failure")
    if event is None or not (text := describe({"node": "?", "kind": "unknown", "message": "", **event})):
        return ""
    return text + (f", at step {event['at_step']}" if is_count(event.get("at_step")) else "")


def by_events(run: RunFolder) -> JobStatus:
    """The status of a run that `muster submit` did not start, from what its ranks wrote."""
    event = last_event(run.read_events(), "done", "ended", "training", "continued")
    if event is None or event["event"] == "continued":
        return JobStatus(Phase.PENDING)
    if event["event"] == "done":
        return JobStatus(Phase.DONE, code=DONE)
    if event["event"] == "training":
        return JobStatus(Phase.RUNNING, "according to its own records; no platform was asked")
    code = event["code"] if is_count(event.get("code")) else FAILED
    return JobStatus(Phase.STOPPED if code == STOPPED else Phase.FAILED, str(event.get("reason", "")), code)


def _unless_ended(run: RunFolder, otherwise: JobStatus) -> JobStatus:
    """The status of a run whose platform is not asked: the end that its events know, else what is given."""
    status = by_events(run)
    return otherwise if status.is_active else status


def status_text(status: dict[str, Any]) -> str:
    """What is known, a line for each thing; `muster status --json` has the same for machines."""
    lines = [f"{' '.join(filter(None, (status['state'], status['waiting'])))}: {status['run']}"]
    if status["steps"] or status["step"]:
        of = f" of {status['steps']}" if status["steps"] else ""
        epochs = f", epoch {status['epoch'] or 1} of {status['epochs']}" if status["epochs"] else ""
        lines.append(f"step {status['step'] or 0}{of}{epochs}")
    train, speed = values_of(status["train"])
    times = [f"trained for {duration(status['elapsed_s'])}" if status["elapsed_s"] is not None else "", speed]
    times += [f"about {duration(status['left_s'])} left" if status["left_s"] is not None else ""]
    lines.append(", ".join(filter(None, times)))
    lines.append(f"train {'  '.join(train)}" if train else "")
    lines.append(f"evaluation {'  '.join(numbers(status['metrics']))}" if status["metrics"] else "")
    if status["restarts"]:
        lines += [f"restarts {status['restarts_text']}", status["goodput_text"]]
    if status["last_failure"] and status["state"] != Phase.FAILED:  # or it is the reason
        lines.append(f"last failure: {status['last_failure']}")
    lines += [f"on {status['platform']}: {status['place']}" if status["place"] else "", status["reason"]]
    return "\n".join(line for line in lines if line)


def logs(run_path: str, rank: int | None, following: bool) -> None:
    """Print one rank's log, or those of all agents; go on while the run lives when `following`."""
    run = find_run(run_path)
    handle, ask = status_of(run)
    tails: dict[Path, Tail] = {}
    said = ""
    while True:
        now = ask()  # in any case: on Kubernetes this copies the pods' logs here
        if now.phase == Phase.UNKNOWN and now.reason != said:  # there may never be more to see
            said = now.reason
            warn(said)
        if handle is not None:
            platform_of(handle).bring_rank_log(run, handle, rank)
        nodes = sorted(run.logs.glob("node-*.log")) if rank is None else []
        for path in nodes or run.logs_of_ranks(rank):
            if path not in tails:
                tails[path] = Tail(path)
                tails[path].offset = 0
            tails[path].copy()
        if not following or not now.is_active or nobody_reads():
            break
        time.sleep(0.2)
    if rank is not None and not tails:
        here = [path.stem for path in (*sorted(run.logs.glob("node-*.log")), *run.logs_of_ranks())]
        remedy = f"There are {', '.join(here) or 'none yet'}"
        if any(name.startswith("node-") for name in here) and not last_event(run.read_events(), "wired"):
            remedy += (
                f"; the nodes have it in their own run folder, as {run.name}/{run.rank_log(rank).relative_to(run.path)}"
            )
            remedy += "; `muster logs RUN` shows what rank 0 printed" if rank == 0 else ""
        raise JobError("--rank", rank, "has no log here", remedy)


def cancel(given: str | RunFolder) -> None:
    """Stop a run for good; of a sweep those that have not ended."""
    path = None if isinstance(given, RunFolder) else find_any(given)
    sweep = read_sweep(path) if path else None
    if sweep is None:
        _cancel(given)
        return
    failed = []
    for run in sweep.runs[::-1]:  # the last ones first: they wait for the others
        try:
            if run.handle.exists() and status_of(run)[1]().is_active:
                _cancel(run)
        except JobError as error:  # the others are stopped all the same
            failed.append((run, error))
    for run, problem in failed:
        if status_of(run)[1]().is_active:  # else it ended meanwhile
            raise problem


def _cancel(given: str | RunFolder) -> None:
    run, platform, handle = _submitted(given)
    platform.cancel(run, handle)
    run.record("cancel_requested")
    try:
        write_json(run.handle, handle | {"cancelled": True})
    except OSError as error:  # it is cancelled all the same; `muster status` will say that it stopped
        warn(f"{run.handle} cannot be written: {error.strerror}")


def preempt(run_path: str) -> None:
    run, platform, handle = _submitted(run_path)
    platform.preempt(run, handle)
    run.record("preempt_requested")


def list_all(runs: Path) -> list[dict[str, Any]]:
    return [status_or_problem(run) for run in RunFolder.list_all(runs)]


def status_or_problem(run: RunFolder) -> dict[str, Any]:
    """The status of a run; of one that cannot be read, why: the others are listed all the same."""
    try:
        return status(run)
    except (JobError, OSError) as error:
        reason = str(error) if isinstance(error, JobError) else f"its records cannot be read: {error!r}"
        return {"run": str(run), "state": Phase.UNKNOWN, "reason": reason}


def list_text(statuses: list[dict[str, Any]]) -> str:
    line = "{state:10} {platform:10} step {step}/{steps:<8} {run}{restarted}"
    rows = [
        {"platform": "-", "step": 0, "steps": "?", "restarted": ""} | {k: v for k, v in item.items() if v}
        | ({"restarted": f"  restarts {item['restarts_text']}"} if item.get("restarts") else {})
        for item in statuses
    ]  # fmt: skip
    return "\n".join(line.format(**row) for row in rows) or "no runs"
