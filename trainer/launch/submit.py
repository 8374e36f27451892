"""How a job becomes a run on its platform: `muster run`, `submit` and `render`, apart from parsing."""

import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import WRONG_JOB, JobError, MaybeAccepted
from trainer.launch.control import status_of
from trainer.launch.follow import follow
from trainer.launch.moved import find_code
from trainer.launch.platform import AnyPlan, AnyPlatform, Phase, Plan, find_platform, site_fact
from trainer.records import read_json, write_json
from trainer.run.folder import JOB, RunFolder
from trainer.run.ownership import check_owner, note_open_modes
from trainer.wiring.secret import make_secret


def _find_run(job_path: str) -> RunFolder | None:
    """The run that `job_path` means; None when it is a job file."""
    path = Path(job_path)
    is_run = path.is_dir() or (path.name == JOB and RunFolder(path.parent).exists())
    return RunFolder.open(path) if is_run else None


def refuse_run(job_path: str) -> None:
    """Refuse a run where only a job file will do. Raises JobError: it is one, or a folder of something else."""
    if _find_run(job_path):
        raise JobError("JOB", job_path, "is a run, not a job file", "Give the job file that it was made from")


def _make_run(plan: AnyPlan, job_path: str, suffix: str = "") -> RunFolder:
    return RunFolder.create(plan.job.runs, plan.job.name + suffix, plan.job_text, Path(job_path).resolve().parent)


def _plan(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> tuple[AnyPlatform, AnyPlan]:
    """The job on its platform; for a run, the platform that it was submitted to. A new run has no folder yet."""
    from trainer.config.load import merge_job, to_job, to_text  # here: `muster status` starts faster without

    run = _find_run(job_path)
    if run:
        find_code(run)
    before = (read_json(run.handle) or read_json(run.platform) or {}) if run else {}
    on = on or before.get("platform", "local")
    if site is None and on == before.get("platform") and before.get("site"):
        site = Path(before["site"])
    try:
        config = merge_job(run.job if run else job_path, overrides)
    except JobError as error:
        raise site_fact(error, on) or error from None
    platform = find_platform(on)
    job = to_job(config, platform.runs_code_of_here)
    facts = platform.load_site(site)
    runs = getattr(facts, "runs", None)  # where some sites want run folders to be
    if run is None and runs and not any(word.startswith("runs=") for word in overrides):
        config.runs = job.runs = runs
    folder = None if run else Path(job_path).resolve().parent
    run = run or RunFolder(Path(job.runs).resolve() / f"{job.name}-ID")
    return platform, Plan(job, to_text(config), run, facts, site, folder)


@contextmanager
def _begin(
    job_path: str, overrides: Sequence[str], on: str | None, site: Path | None
) -> Iterator[tuple[AnyPlatform, AnyPlan]]:
    """As `_plan`, and make the run folder, or prepare the folder of a run that ended for its continuation.

    A job that is refused meanwhile leaves no folder behind, and a run that is, stays as it was.
    """
    run = _find_run(job_path)
    if run is not None:
        check_owner(run)
    platform, plan = _plan(job_path, overrides, on, site)
    if run is None:
        plan = replace(plan, run=_make_run(plan, job_path))
        with _removed_if_refused([plan.run]):
            yield platform, plan
        return
    handle, ask = status_of(run)
    now = ask()
    if handle and now.phase == Phase.UNKNOWN:
        remedy = f"If you know that it has ended, remove {run.handle}, and say `muster run` again"
        raise JobError("RUN", str(run), f"may still be running: {now.reason}", remedy)
    if handle and now.is_active:
        raise JobError("RUN", str(run), "is running", "Cancel it first, or follow it with `muster logs -f`")
    before = {path: path.read_bytes() for path in (run.job, run.platform, run.failure, run.result) if path.exists()}
    run.job.write_text(plan.job_text)
    run.record("continued")
    for stale in (run.failure, run.result):
        stale.unlink(missing_ok=True)
    try:
        yield platform, plan
    except JobError as error:
        for path, content in before.items():
            path.write_bytes(content)
        run.record("ended", code=WRONG_JOB, reason=str(error))  # otherwise it would be pending forever
        raise


@contextmanager
def _removed_if_refused(folders: list[RunFolder]) -> Iterator[None]:
    """Remove new folders when the job is refused: nothing was started, so there is nothing to continue."""
    try:
        yield
    except MaybeAccepted as error:  # what may have been started needs its folder
        for folder in folders:
            folder.record("ended", code=WRONG_JOB, reason=str(error))
        raise
    except JobError:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _place(platform: AnyPlatform, plan: AnyPlan, runs: list[RunFolder]) -> dict[str, Any]:
    """Keep where the runs go, before the platform is asked: they will be continued there. Make their secrets."""
    place = {"platform": platform.name, "site": str(plan.site_file.resolve()) if plan.site_file else None}
    for run in runs:
        run.plan.mkdir(exist_ok=True)
        write_json(run.platform, place)
        make_secret(run.secret)
    note_open_modes(runs[0])
    return place


def _submit(platform: AnyPlatform, plan: AnyPlan, following: bool) -> dict[str, Any]:
    place = _place(platform, plan, [plan.run])
    platform.take_code(plan)
    request = platform.build(plan)
    (plan.run.plan / f"{platform.name}.txt").write_text(platform.render(request) + "\n")
    handle = place | platform.submit(plan, request, following) | {"run": str(plan.run)}
    write_json(plan.run.handle, handle)
    return handle


def run_job(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None, all_ranks: bool = False) -> int:
    """Submit and follow; pass a stop request on to the job. Return the job's exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _begin(job_path, overrides, on, site) as (platform, plan):
        handle = _submit(platform, plan, True)
    run = plan.run
    print(f"run folder: {run}", flush=True)
    ask, stop = partial(platform.status, run, handle), partial(platform.cancel, run, handle)
    return follow(run, plan.job, ask, stop, all_ranks, platform.copies_logs)


def submit_job(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> RunFolder:
    with _begin(job_path, overrides, on, site) as (platform, plan):
        _submit(platform, plan, False)
    return plan.run


def submit_sweep(
    job_path: str, overrides: Sequence[str], on: str | None, site: Path | None, sweep: str
) -> list[RunFolder]:
    """Submit one run for each value of `key=value,value`; return the run folders."""
    from trainer.config.values import split_values

    key, _, text = sweep.partition("=")
    values = split_values(text)
    if not key or not values:
        raise JobError("--sweep", sweep, "is not key=value,value", "For example --sweep train.lr=0.1,0.01")
    refuse_run(job_path)
    plans = [_plan(job_path, [*overrides, f"{key}={value}"], on, site) for value in values]
    platform, first = plans[0]
    if not platform.has_arrays:
        problem, remedy = f"{platform.name} has no job arrays", "Use --on slurm, or submit the jobs one by one"
        raise JobError("--sweep", sweep, problem, remedy)
    asked = [platform.resources(plan) for _, plan in plans]
    for value, words in zip(values, asked, strict=True):
        if words != asked[0]:
            other = " ".join(word for word in words if word not in asked[0])
            problem = f"the runs of one array get the same nodes and devices, but {key}={value} needs {other}"
            remedy = f"Submit them one by one: muster submit {job_path} {key}={value} --on {platform.name}"
            raise JobError("--sweep", sweep, problem, remedy)
    runs = [_make_run(plan, job_path) for _, plan in plans]
    folder = _make_run(first, job_path, "-sweep")
    folder.job.unlink()  # a sweep is not a run
    write_json(folder.sweep, {"sweep": sweep, "runs": [str(run) for run in runs]})
    place = _place(platform, first, runs)
    with _removed_if_refused([*runs, folder]):
        handles = platform.submit_sweep(replace(first, run=folder), runs)
    for run, handle in zip(runs, handles, strict=True):
        write_json(run.handle, place | handle | {"run": str(run)})
    return runs


def render_job(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> str:
    platform, plan = _plan(job_path, overrides, on, site)
    return platform.render(platform.build(plan))
