"""What each verb of `muster` does, apart from parsing and printing."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import Job
from trainer.errors import WRONG_JOB, JobError
from trainer.folder import open_run
from trainer.launch.follow import follow
from trainer.launch.platform import Plan, Platform, State, find_platform
from trainer.launch.runs import last_event, list_runs, make_run
from trainer.record import read_json, read_lines, record_event, write_json
from trainer.tail import Tail

if TYPE_CHECKING:  # it takes a third of the time of a verb that only reads
    from omegaconf import DictConfig


def _load(job_path: str, overrides: Sequence[str]) -> tuple[DictConfig, Job, Path | None]:
    """The job, and its run folder when `job_path` is one."""
    from trainer.load import merge_job, to_job

    path = Path(job_path)
    if path.is_dir() or (path.name == "job.yaml" and (path.parent / "events.jsonl").exists()):
        run: Path | None = open_run(path)
        path = Path(str(run), "job.yaml")
    else:
        run = None
    config = merge_job(path, overrides)
    return config, to_job(config), run


def _plan(job_path: str, overrides: Sequence[str], on: str, site: Path | None) -> tuple[Platform, Plan]:
    from trainer.load import save_job

    config, job, run = _load(job_path, overrides)
    platform = find_platform(on)
    facts = platform.load_site(site)
    if run is None:
        if facts.get("runs"):
            config.runs = job.runs = facts["runs"]
        run = make_run(job, config, Path(job_path).resolve().parent)
    else:
        handle = read_json(run / "handle.json")
        if handle and find_platform(handle["platform"]).state(run, handle).word in ("pending", "running"):
            raise JobError("RUN", str(run), "is running", "Cancel it first, or follow it with `muster logs -f`")
        save_job(config, run / "job.yaml")
        for stale in ("failure.json", "result.json"):
            (run / stale).unlink(missing_ok=True)
    return platform, Plan(job, config, run, facts)


def _submit(platform: Platform, plan: Plan, following: bool) -> dict[str, Any]:
    (plan.run / "plan").mkdir(exist_ok=True)
    (plan.run / "plan" / f"{platform.name}.txt").write_text(platform.render(plan) + "\n")
    try:
        handle = {"platform": platform.name, **platform.submit(plan, following)}
    except JobError as error:
        record_event(plan.run, "ended", code=WRONG_JOB, reason=str(error))
        raise
    write_json(plan.run / "handle.json", handle)
    return handle


def run(job_path: str, overrides: Sequence[str], on: str, site: Path | None) -> int:
    """Submit and follow; a stop request is passed on to the job."""
    platform, plan = _plan(job_path, overrides, on, site)
    print(f"run folder: {plan.run}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    handle = _submit(platform, plan, True)

    def stop() -> None:
        platform.cancel(plan.run, handle)

    return follow(plan.run, lambda: platform.state(plan.run, handle), stop)


def submit(job_path: str, overrides: Sequence[str], on: str, site: Path | None) -> Path:
    """Submit; return the run folder."""
    platform, plan = _plan(job_path, overrides, on, site)
    _submit(platform, plan, False)
    return plan.run


def submit_sweep(job_path: str, overrides: Sequence[str], on: str, site: Path | None, sweep: str) -> list[Path]:
    """Submit one run for each value of `key=value,value`; return the run folders."""
    key, _, text = sweep.partition("=")
    values = [value for value in text.split(",") if value]
    if not key or not values:
        raise JobError("--sweep", sweep, "is not key=value,value", "For example --sweep train.lr=0.1,0.01")
    loaded = [_load(job_path, [*overrides, f"{key}={value}"]) for value in values]
    platform = find_platform(on)
    facts = platform.load_site(site)
    beside = Path(job_path).resolve().parent
    if facts.get("runs"):
        for config, job, _ in loaded:
            config.runs = job.runs = facts["runs"]
    runs = [make_run(job, config, beside) for config, job, _ in loaded]
    config, job, _ = loaded[0]
    folder = make_run(dataclasses.replace(job, name=f"{job.name}-sweep"), config, beside)
    (folder / "job.yaml").unlink()  # a sweep is no run
    write_json(folder / "sweep.json", {"sweep": sweep, "runs": [str(run) for run in runs]})
    (folder / "plan").mkdir(exist_ok=True)
    handles = platform.submit_sweep(Plan(job, config, folder, facts), runs)
    for run, handle in zip(runs, handles, strict=True):
        write_json(run / "handle.json", {"platform": platform.name, **handle})
    return runs


def render(job_path: str, overrides: Sequence[str], on: str, site: Path | None) -> str:
    """What would be submitted."""
    config, job, run = _load(job_path, overrides)
    platform = find_platform(on)
    folder = run or Path(job.runs).resolve() / f"{job.name}-ID"
    return platform.render(Plan(job, config, folder, platform.load_site(site)))


def _handle(run: Path) -> tuple[Platform, dict[str, Any]]:
    handle = read_json(run / "handle.json")
    if handle is None:
        raise JobError("RUN", str(run), "was not submitted by muster", "It has no handle.json")
    return find_platform(handle["platform"]), handle


def status(run_path: str) -> dict[str, Any]:
    """Everything that is known about a run."""
    run = open_run(run_path)
    handle = read_json(run / "handle.json")
    state = find_platform(handle["platform"]).state(run, handle) if handle else _by_events(run)
    events = read_lines(run / "events.jsonl")
    training = last_event(events, "training") or {}
    metrics = read_lines(run / "metrics.jsonl")
    trained = [line["step"] for line in metrics] or [training.get("step")]
    evaluated = [line for line in metrics if line["kind"] == "evaluation"]
    attempts = last_event(events, "attempt", "restart") or {}
    failure = read_json(run / "failure.json") or {}
    ended = last_event(events, "ended") or {}
    running = state.word in ("running", "pending", "done")
    skip = ("kind", "step", "attempt", "time")
    return {
        "run": str(run), "platform": handle["platform"] if handle else None, "state": state.word,
        "reason": state.reason or ("" if running else failure.get("reason") or ended.get("reason") or ""),
        "code": state.code, "step": trained[-1], "steps": training.get("steps"),
        "attempt": attempts.get("attempt"), "handle": handle,
        "metrics": {k: v for k, v in evaluated[-1].items() if k not in skip} if evaluated else {},
    }  # fmt: skip


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
    if rank is not None and not following and not (folder / f"rank-{rank}.log").exists():
        known = sorted(path.stem for path in folder.glob("rank-*.log"))
        raise JobError("--rank", rank, "has no log", f"There are {', '.join(known) or 'none yet'}")
    pattern = "node-*.log" if rank is None else f"rank-{rank}.log"
    tails: dict[Path, Tail] = {}
    while True:
        state = status(run_path)["state"] if following else ""
        for path in sorted(folder.glob(pattern)) or sorted(folder.glob("rank-*.log" if rank is None else pattern)):
            if path not in tails:
                tails[path] = Tail(path)
                tails[path].offset = 0
            tails[path].copy()
        if state not in ("pending", "running"):
            return
        time.sleep(0.2)


def cancel(run_path: str) -> None:
    """Stop for good."""
    run = open_run(run_path)
    platform, handle = _handle(run)
    write_json(run / "handle.json", handle | {"cancelled": True})
    record_event(run, "cancel_requested")
    platform.cancel(run, handle)


def preempt(run_path: str) -> None:
    """Stop and come back."""
    run = open_run(run_path)
    platform, handle = _handle(run)
    record_event(run, "preempt_requested")
    platform.preempt(run, handle)


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
