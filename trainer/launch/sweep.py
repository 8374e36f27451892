"""A sweep: one run for each value of a key, and the folder that names them, `<job>-sweep-<id>/sweep.json`.

Slurm gets one array. Elsewhere each run is submitted by itself; on this machine they wait for each other, for GPUs or,
where there are none, in their order (`trainer.launch.local.supervisor`).
"""

import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import Cut, JobError, MaybeAccepted
from trainer.launch import control
from trainer.launch.follow import follow
from trainer.launch.platform import AnyPlan, AnyPlatform, combined_exit_code, platform_of
from trainer.launch.submit import make_plan, make_run, place, refuse_run, removed_if_refused, send
from trainer.records import read_json, write_json
from trainer.run.line_file import warn
from trainer.run.sweep import Sweep


def submit_sweep(
    job_path: str, overrides: Sequence[str], on: str | None, site: Path | None, sweep: str, following: bool = False
) -> Sweep:
    """Submit one run for each value of `key=value,value`."""
    from trainer.config.values import split_values

    key, _, text = sweep.partition("=")
    values = split_values(text)
    if not key or not values:
        raise JobError("--sweep", sweep, "is not key=value,value", "For example --sweep train.lr=0.1,0.01")
    refuse_run(job_path)
    plans = [make_plan(job_path, [*overrides, f"{key}={value}"], on, site) for value in values]
    platform, first = plans[0]
    if platform.has_arrays:
        _check_sizes(platform, [plan for _, plan in plans], key, values, sweep, job_path)
    made = Sweep(make_run(first, job_path, "-sweep"), key, values, [make_run(plan, job_path) for _, plan in plans])
    made.folder.job.unlink()  # a sweep is not a run
    made.write()
    if platform.has_arrays:
        _submit_array(platform, first, made)
    else:
        _submit_each([(platform, replace(plan, run=run)) for (_, plan), run in zip(plans, made.runs, strict=True)],
                     made, following)  # fmt: skip
    return made


def _check_sizes(
    platform: AnyPlatform, plans: list[AnyPlan], key: str, values: list[str], sweep: str, job_path: str
) -> None:
    """Refuse runs that need different machines, where all of them get the same. Raises JobError."""
    asked = [platform.resources(plan) for plan in plans]
    for value, words in zip(values, asked, strict=True):
        if words != asked[0]:
            other = " ".join(word for word in words if word not in asked[0])
            problem = f"the runs of one array get the same nodes and devices, but {key}={value} needs {other}"
            remedy = f"Submit them one by one: muster submit {job_path} {key}={value} --on {platform.name}"
            raise JobError("--sweep", sweep, problem, remedy)


def _submit_array(platform: AnyPlatform, plan: AnyPlan, sweep: Sweep) -> None:
    where = place(platform, plan, sweep.runs)
    with removed_if_refused([*sweep.runs, sweep.folder]):
        handles = platform.submit_sweep(replace(plan, run=sweep.folder), sweep.runs)
    for run, handle in zip(sweep.runs, handles, strict=True):
        write_json(run.handle, where | handle | {"run": str(run)})


def _submit_each(plans: list[tuple[AnyPlatform, AnyPlan]], sweep: Sweep, following: bool) -> None:
    """Submit one after the other. Raises JobError: one was refused, or may be there; the sweep ends with what is."""
    for _, plan in plans:
        plan.run.plan.mkdir(exist_ok=True)
        write_json(plan.run.part_of, {"sweep": str(sweep.folder)})
    for index, (platform, plan) in enumerate(plans):
        try:
            with removed_if_refused([plan.run]):
                send(platform, plan, following)
        except JobError as error:
            kept = index + isinstance(error, MaybeAccepted)
            for folder in [*sweep.runs[kept:], *([] if kept else [sweep.folder])]:
                shutil.rmtree(folder, ignore_errors=True)
            if not kept:
                raise
            replace(sweep, values=sweep.values[:kept], runs=sweep.runs[:kept]).write()
            remedy = error.remedy
            if isinstance(error, Cut):  # the same command would begin another sweep
                remedy = f"The job may be there or not: `muster submit {plan.run}` completes it"
            note = f"This was run {index + 1} of {len(plans)}. Those after it were not submitted"
            note += f": `muster list {sweep.folder}` shows those that were"
            raise type(error)(error.key, error.value, error.problem, f"{remedy}. {note}") from None


def run_sweep(
    job_path: str, overrides: Sequence[str], on: str | None, site: Path | None, sweep: str, all_ranks: bool = False
) -> tuple[Sweep, int]:
    """Submit a sweep and follow its runs, one after the other, to their ends; return the exit code of all together."""
    from trainer.config.load import merge_job, to_job

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    made = submit_sweep(job_path, overrides, on, site, sweep, following=True)
    codes = []

    def stop() -> None:
        try:
            control.cancel(str(made.folder))
        except JobError as error:  # those that go on are followed all the same
            warn(str(error))

    for run, line in zip(made.runs, made.lines, strict=True):
        handle: dict[str, Any] = read_json(run.handle) or {}
        platform = platform_of(handle)
        platform.following = True
        print(f"\nrun folder: {line}", flush=True)
        job = to_job(merge_job(run.job), platform.runs_code_of_here)
        codes.append(follow(run, job, partial(platform.status, run, handle), stop, all_ranks, platform.speaks))
    return made, combined_exit_code(codes)
