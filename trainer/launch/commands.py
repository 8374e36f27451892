"""What each verb of `muster` does, apart from parsing and printing."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import WRONG_JOB, JobError
from trainer.folder import open_run
from trainer.launch.early import drop_supervisor
from trainer.launch.follow import follow
from trainer.launch.platform import Plan, Platform, State, find_platform
from trainer.launch.runs import last_event, list_runs, make_run
from trainer.record import read_json, read_lines, record_event, write_json
from trainer.tail import Tail


def _find_run(job_path: str) -> Path | None:
    """The folder of the run that `job_path` means; None when it is a job file."""
    path = Path(job_path)
    if path.is_dir() or (path.name == "job.yaml" and (path.parent / "events.jsonl").exists()):
        return open_run(path)
    return None


def _plan(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> tuple[Platform, Plan]:
    """The job on its platform, which of a run is the one that it was submitted to; a new run has no folder yet."""
    from trainer.load import merge_job, to_job

    run = _find_run(job_path)
    before = (read_json(run / "handle.json") or read_json(run / "plan" / "platform.json") or {}) if run else {}
    on = on or before.get("platform", "local")
    if site is None and on == before.get("platform") and before.get("site"):
        site = Path(before["site"])
    config = merge_job(run / "job.yaml" if run else job_path, overrides)
    job = to_job(config)
    platform = find_platform(on)
    facts = platform.load_site(site)
    if run is None and facts.get("runs") and not any(word.startswith("runs=") for word in overrides):
        config.runs = job.runs = facts["runs"]
    return platform, Plan(job, config, run or Path(job.runs).resolve() / f"{job.name}-ID", facts, site)


def _begin(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> tuple[Platform, Plan]:
    """As `_plan`, with the run folder made, or with that of a run that ended made ready to go on."""
    from trainer.load import save_job

    platform, plan = _plan(job_path, overrides, on, site)
    run = _find_run(job_path)
    if run is None:
        return platform, replace(plan, run=make_run(plan.job, plan.config, Path(job_path).resolve().parent))
    handle, ask = _state(run)
    if handle and ask().word in ("pending", "running"):
        raise JobError("RUN", str(run), "is running", "Cancel it first, or follow it with `muster logs -f`")
    save_job(plan.config, run / "job.yaml")
    for stale in ("failure.json", "result.json"):
        (run / stale).unlink(missing_ok=True)
    return platform, plan


def _remember(platform: Platform, plan: Plan, run: Path) -> dict[str, Any]:
    """The part of a handle that is known before: where a run goes on, also one that the platform refuses at first."""
    (run / "plan").mkdir(exist_ok=True)
    place = {"platform": platform.name, "site": str(plan.site_file.resolve()) if plan.site_file else None}
    write_json(run / "plan" / "platform.json", place)
    return place


def _submit(platform: Platform, plan: Plan, following: bool) -> dict[str, Any]:
    place = _remember(platform, plan, plan.run)
    (plan.run / "plan" / f"{platform.name}.txt").write_text(platform.render(plan) + "\n")
    with _refusals_recorded([plan.run]):
        handle = {**place, **platform.submit(plan, following)}
    write_json(plan.run / "handle.json", handle)
    return handle


@contextmanager
def _refusals_recorded(runs: list[Path]) -> Iterator[None]:
    """Let runs that the platform refuses say so: they would be pending for ever."""
    try:
        yield
    except JobError as error:
        for run in runs:
            record_event(run, "ended", code=WRONG_JOB, reason=str(error))
        raise


def run(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> int:
    """Submit and follow; a stop request is passed on to the job."""
    platform, plan = _begin(job_path, overrides, on, site)
    if platform.name != "local":
        drop_supervisor()
    print(f"run folder: {plan.run}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    handle = _submit(platform, plan, True)

    def stop() -> None:
        platform.cancel(plan.run, handle)

    return follow(plan.run, lambda: platform.state(plan.run, handle), stop)


def submit(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> Path:
    """Submit; return the run folder."""
    platform, plan = _begin(job_path, overrides, on, site)
    _submit(platform, plan, False)
    return plan.run


def submit_sweep(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None, sweep: str) -> list[Path]:
    """Submit one run for each value of `key=value,value`; return the run folders."""
    key, _, text = sweep.partition("=")
    values = [value for value in text.split(",") if value]
    if not key or not values:
        raise JobError("--sweep", sweep, "is not key=value,value", "For example --sweep train.lr=0.1,0.01")
    if _find_run(job_path):
        raise JobError("JOB", job_path, "is a run, which would go on", "Give the job file that it was made from")
    plans = [_plan(job_path, [*overrides, f"{key}={value}"], on, site) for value in values]
    platform, first = plans[0]
    if not platform.arrays:
        raise JobError(
            "--sweep", sweep, f"{platform.name} has no job arrays", "Use --on slurm, or submit the jobs one by one"
        )
    beside = Path(job_path).resolve().parent
    runs = [make_run(plan.job, plan.config, beside) for _, plan in plans]
    folder = make_run(replace(first.job, name=f"{first.job.name}-sweep"), first.config, beside)
    (folder / "job.yaml").unlink()  # a sweep is no run
    write_json(folder / "sweep.json", {"sweep": sweep, "runs": [str(run) for run in runs]})
    places = [_remember(platform, first, run) for run in runs]
    with _refusals_recorded(runs):
        handles = platform.submit_sweep(replace(first, run=folder), runs)
    for run, place, handle in zip(runs, places, handles, strict=True):
        write_json(run / "handle.json", {**place, **handle})
    return runs


def render(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> str:
    """What would be submitted."""
    platform, plan = _plan(job_path, overrides, on, site)
    return platform.render(plan)


def _state(run: Path) -> tuple[dict[str, Any] | None, Callable[[], State]]:
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
    handle, ask = _state(run)
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
    _, ask = _state(run)
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
