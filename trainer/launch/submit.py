"""How a job becomes a run on its platform: `muster run`, `submit` and `render`, apart from parsing."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trainer.errors import WRONG_JOB, Cut, JobError, MaybeAccepted, Refused
from trainer.launch.control import status_of
from trainer.launch.follow import follow
from trainer.launch.moved import find_code
from trainer.launch.platform import AnyPlan, AnyPlatform, Phase, Plan, find_platform, reached, site_fact
from trainer.records import read_json, write_json
from trainer.run.folder import JOB, RunFolder
from trainer.run.named import find_path, find_run
from trainer.run.ownership import check_owner, note_open_modes
from trainer.wiring.secret import make_secret


def _find_run(job_path: str) -> RunFolder | None:
    """The run that `job_path` means; None when it is a job file, or may be one that is not there."""
    path = Path(job_path)
    if path.is_file() and not (path.name == JOB and RunFolder(path.parent).exists()):
        return None
    return find_run(job_path) if path.exists() or find_path(job_path) else None


def refuse_run(job_path: str) -> None:
    """Refuse a run where only a job file will do. Raises JobError: it is one, or a folder of something else."""
    if _find_run(job_path):
        raise JobError("JOB", job_path, "is a run, not a job file", "Give the job file that it was made from")


def make_run(plan: AnyPlan, job_path: str, suffix: str = "") -> RunFolder:
    """A new run folder for a plan, which is the job's name, then `suffix`, then an id."""
    return RunFolder.create(plan.job.runs, plan.job.name + suffix, plan.job_text, Path(job_path).resolve().parent)


def make_plan(
    job_path: str, overrides: Sequence[str], on: str | None, site: Path | None
) -> tuple[AnyPlatform, AnyPlan]:
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
    by_ssh = bool(getattr(facts, "ssh", None))
    runs = None if by_ssh else getattr(facts, "runs", None)  # where some sites want run folders to be
    if run is None and runs and not any(word.startswith("runs=") for word in overrides):
        config.runs = job.runs = runs
    folder = None if run else Path(job_path).resolve().parent
    run = run or RunFolder(Path(job.runs).resolve() / f"{job.name}-ID")
    return reached(platform, by_ssh), Plan(job, to_text(config), run, facts, site, folder)


@contextmanager
def _begin(
    job_path: str, overrides: Sequence[str], on: str | None, site: Path | None
) -> Iterator[tuple[AnyPlatform, AnyPlan]]:
    """As `make_plan`, and make the run folder, or prepare the folder of a run that ended for its continuation.

    A job that is refused meanwhile leaves no folder behind, and a run that is, stays as it was.
    """
    run = _find_run(job_path)
    if run is not None:
        check_owner(run)
        if not Path(job_path).exists():  # it may have been meant to be a job file
            print(f"note: {job_path} is the run {run.name}", file=sys.stderr)
    platform, plan = make_plan(job_path, overrides, on, site)
    if begun := platform.unfinished(plan):
        with removed_if_refused([begun] if run is None else [], Refused):  # it may be there by an earlier try
            yield platform, replace(plan, run=begun)
    elif run is None:
        plan = replace(plan, run=make_run(plan, job_path))
        with removed_if_refused([plan.run]):
            yield platform, plan
    else:
        host = (read_json(run.handle) or {}).get("ssh")
        if host and not getattr(plan.site, "ssh", None) and run.steps_committed() < 0:
            remedy = f"Continue it there, or bring them first: muster pull {run} --checkpoints last"
            raise JobError("RUN", str(run), f"its checkpoints are on {host}", remedy)
        with continued(run, plan):
            yield platform, plan


@contextmanager
def continued(run: RunFolder, plan: AnyPlan) -> Iterator[None]:
    """Prepare the folder of a run that ended. When the job is refused meanwhile, it is as before."""
    handle, ask = status_of(run)
    now = ask()
    if handle and now.phase == Phase.UNKNOWN:
        remedy = f"If you know that it has ended, remove {run.handle}, and say `muster run` again"
        raise JobError("RUN", str(run), f"may still be running: {now.reason}", remedy)
    if handle and now.is_active:
        raise JobError("RUN", str(run), "is running", "Cancel it first, or follow it with `muster logs -f`")
    files = [path for path in (run.job, run.platform, run.failure, run.result) if path.exists()]
    before = {path: (path.read_bytes(), path.stat()) for path in files}
    run.job.write_text(plan.job_text)
    run.record("continued")
    for stale in (run.failure, run.result):
        stale.unlink(missing_ok=True)
    try:
        yield
    except Cut:
        raise
    except JobError as error:
        for path, (content, stat) in before.items():
            path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # it is `latest` no more than before
        run.record("ended", code=WRONG_JOB, reason=str(error))  # otherwise it would be pending forever
        raise


@contextmanager
def removed_if_refused(folders: list[RunFolder], refusal: type[JobError] = JobError) -> Iterator[None]:
    """Remove new folders when the job is refused: nothing was started, so there is nothing to continue."""
    try:
        yield
    except Cut:
        raise
    except MaybeAccepted as error:  # what may have been started needs its folder
        for folder in folders:
            folder.record("ended", code=WRONG_JOB, reason=str(error))
        raise
    except refusal:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def place(platform: AnyPlatform, plan: AnyPlan, runs: list[RunFolder]) -> dict[str, Any]:
    """Keep where the runs go, before the platform is asked: they will be continued there. Make their secrets."""
    place = {"platform": platform.name, "site": str(plan.site_file.resolve()) if plan.site_file else None}
    for run in runs:
        run.plan.mkdir(exist_ok=True)
        write_json(run.platform, place)
        make_secret(run.secret)
    note_open_modes(runs[0])
    return place


def send(
    platform: AnyPlatform, plan: AnyPlan, following: bool, marks: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Submit a plan, and keep what was submitted; return its handle, with `marks`. `following`: until its end."""
    where = place(platform, plan, [plan.run])
    platform.take_code(plan)
    request = platform.build(plan)
    (plan.run.plan / f"{platform.name}.txt").write_text(platform.render(request) + "\n")
    handle = where | platform.submit(plan, request, following) | {"run": str(plan.run), **marks}
    write_json(plan.run.handle, handle)
    return handle


def run_job(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None, all_ranks: bool = False) -> int:
    """Submit and follow; pass a stop request on to the job. Return the job's exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _begin(job_path, overrides, on, site) as (platform, plan):
        handle = send(platform, plan, True)
    run = plan.run
    print(f"run folder: {run}", flush=True)
    ask, stop = partial(platform.status, run, handle), partial(platform.cancel, run, handle)
    return follow(run, plan.job, ask, stop, all_ranks, platform.speaks)


def submit_job(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> RunFolder:
    with _begin(job_path, overrides, on, site) as (platform, plan):
        send(platform, plan, False)
    return plan.run


def render_job(job_path: str, overrides: Sequence[str], on: str | None, site: Path | None) -> str:
    platform, plan = make_plan(job_path, overrides, on, site)
    return platform.render(platform.build(plan))
