"""`muster compare`: runs the same job in each mode for a few steps, as ordinary local runs.

What their numbers mean is in `trainer.launch.compare.verdict`.
"""

import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from typing import Any

from trainer.config.job import Job
from trainer.config.load import merge_job, to_job, to_text, valid_keys
from trainer.config.rules import OPTIONS
from trainer.errors import DONE, FAILED, WRONG_JOB, JobError
from trainer.launch import control
from trainer.launch.compare.picture import plot
from trainer.launch.compare.table import text
from trainer.launch.compare.verdict import MODES, NO_SYNC, summarize
from trainer.launch.platform import Phase
from trainer.launch.submit import refuse_run, submit_job
from trainer.records import for_programs, read_json, read_lines, write_json
from trainer.run.folder import RunFolder, last_event
from trainer.wiring.devices import visible_devices, wanted_devices
from trainer.wiring.hardware import usable_processors

WARM_UP_STEPS = 10
"""At least so many first steps of a run do not count: they fill caches and arrange DDP's buckets."""
NEVER = 10**9
POLL_S = 0.2
NEEDED = ("single", "ddp")
"""Without these there is nothing to compare with."""
LOCAL_STEPS = 8
"""Between two averages of local SGD."""
OWN: dict[str, dict[str, Any]] = {
    "single": {"parallel": "single", "nodes": 1, "devices_per_node": 1}, "dp": {"parallel": "dp"},
    "ddp": {"parallel": "ddp"}, "fsdp": {"parallel": "fsdp"}, "pipeline": {"parallel": "pipeline"},
    "server": {"parallel": "server"}, "local sgd": {"parallel": "ddp", "ddp.sync_every": LOCAL_STEPS},
    "server, async": {"parallel": "server", "server.synchronous": "false"},
}  # fmt: skip
"""What each mode sets."""
Refused = dict[str, str]
"""Why a mode is not compared, by its name."""


class RunEnded(Exception):
    """A run did not reach its end: why, and the exit code."""


def compare(
    job_path: str, overrides: Sequence[str], steps: int, rounds: int, as_json: bool, modes: Sequence[str] | None = None
) -> int:
    """Run, print and write `compare.json`, `compare.png` and the runs into one folder; return the exit code.

    `steps`: of each run that count; `rounds`: timed runs of each mode; `modes`: default all. Raises JobError: the job
    is wrong, or `NEEDED` modes refuse it.
    """
    for key, value in (("--steps", steps), ("--rounds", rounds)):
        if value < 1:
            raise JobError(key, value, "must be at least 1", "Leave it out for the default")
    window = -(-steps // 10)
    warm_up = window * -(-WARM_UP_STEPS // window)
    job, variants, refused = plan(job_path, overrides, warm_up + steps, modes or MODES)
    config, beside = to_text(merge_job(job_path, overrides)), Path(job_path).resolve().parent
    run = RunFolder.create(job.runs, f"{job.name}-compare", config, beside)
    run.job.unlink()  # a comparison is not a run
    folder = run.path
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        every = window if wanted_devices(job, visible_devices()) else 1
        losses, timed = _run_all(job_path, variants, refused, folder, rounds, every, warm_up)
    except RunEnded as error:
        reason, code = error.args
        print(f"ERROR: {reason}", file=sys.stderr)
        return int(code)
    facts = {
        "job": job.name, "folder": str(folder), "devices": job.devices_per_node, "batch_size": job.train.batch_size,
        "precision": job.train.precision, "device": timed["ddp"][0]["device"], "steps": steps,
        "warm_up_steps": warm_up, "rounds": rounds, "processors": usable_processors()[0],
    }  # fmt: skip
    without = [item["speed"] for item in timed.pop(NO_SYNC, [])]
    result = summarize(facts, timed, without, refused, losses)
    write_json(folder / "compare.json", result)
    print(for_programs(result) if as_json else text(result))
    drawn = plot(result, losses, folder / "compare.png")
    print(f"{folder}: {drawn}", file=sys.stderr if as_json else sys.stdout)
    return DONE


def plan(
    job_path: str, overrides: Sequence[str], total: int, modes: Sequence[str] = MODES
) -> tuple[Job, dict[str, list[str]], Refused]:
    """The job as DDP sees it, the `key=value` words of each variant, and why there are no others.

    `total`: steps of each run. Raises JobError: a script, one device, several nodes, or `NEEDED` modes refuse it.
    """
    refuse_run(job_path)
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise JobError("--mode", unknown[0], "is not a mode", f"Use some of: {'; '.join(MODES)}")
    common = [
        f"train.steps={total}", "train.epochs=null", f"evaluation.every_epochs={NEVER}", "evaluation.every_steps=null",
        "checkpoint.every_steps=null", "checkpoint.keep_last=1", "checkpoint.best=null", "checkpoint.best_mode=max",
        "log.tensorboard=false", "log.samples=false", "log.profile_steps=[]", "agent.restarts=0",
    ]  # fmt: skip
    own = [word.partition("=")[0] for word in (*common, "parallel=", "log.every_steps=", "evaluation.batch_size=")]
    for word in overrides:
        key, _, value = word.partition("=")
        if key in own:
            remedy = "Remove it; --steps says how many steps are timed"
            raise JobError(key, value, "compare sets this key itself", remedy)
    job = to_job(merge_job(job_path, [*overrides, *_words(overrides, "ddp")]))
    if job.script:
        raise JobError("script", job.script, "a script has no modes: it decides that itself", "Give a job with a task")
    if job.nodes > 1:
        raise JobError("nodes", job.nodes, "compare runs on one node, as DataParallel must", "Set nodes=1")
    if job.devices_per_node == 1:
        raise JobError("devices_per_node", 1, "leaves nothing to compare", "Set it to 2 or more")
    if not wanted_devices(job, visible_devices()):
        common.append("device=cpu")  # otherwise single alone would find enough GPUs
    share = job.train.batch_size // (job.devices_per_node * job.train.accumulate)
    # Keep the evaluation at the end small: the peak memory should be that of training.
    common.append(f"evaluation.batch_size={max(1, min(job.evaluation.batch_size, share))}")
    primary = [f"devices=[{job.devices[0]}]"] if job.devices else []
    every = {mode: _words(overrides, mode) for mode in MODES if mode in modes or mode in NEEDED}
    every["single"] += primary
    every[NO_SYNC] = [*every["ddp"], f"ddp.sync_every={NEVER}", "ddp.sync_start=0"]
    variants, refused = {}, {}
    for mode, words in every.items():
        try:
            to_job(merge_job(job_path, [*overrides, *common, *words]))
            variants[mode] = [*overrides, *common, *words]
        except JobError as error:
            if mode in NEEDED:
                raise
            refused[mode] = str(error)
    return job, variants, refused


def _words(overrides: Sequence[str], mode: str) -> list[str]:
    """What makes a job one of a mode: its own keys, and the defaults of what other modes alone take."""
    own = {key: str(value) for key, value in OWN[mode].items()}
    others = [name for name in OPTIONS if name != own["parallel"]]
    keys = {key: item.default for name in others for key, item in valid_keys(OPTIONS[name], f"{name}.")}
    plain = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return [*plain, *(f"{key}={value}" for key, value in own.items())]


def _run_all(
    job_path: str, variants: dict[str, list[str]], refused: Refused, folder: Path, rounds: int, window: int,
    warm_up: int,
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, Any]]]]:  # fmt: skip
    """The loss of each step of each mode, and what each of its timed runs measured.

    `window`: steps between two lines of `metrics.jsonl`. Where it is more than one, the losses come from a round of
    their own: to read the loss of each step makes a GPU wait for it. What only a run finds out to be impossible is
    added to `refused`. Raises RunEnded: a run failed or was stopped.
    """
    place = f"runs={json.dumps(str(folder / 'runs'))}"
    turns = [(0, mode, 1) for mode in variants if mode != NO_SYNC] if window > 1 else []
    turns += [(turn, mode, window) for turn in range(1, rounds + 1) for mode in variants]
    losses: dict[str, list[float]] = {}
    timed: dict[str, list[dict[str, Any]]] = {}
    for turn, mode, every in turns:
        if mode in refused:
            continue
        what = f"round {turn} of {rounds}, {mode}" if turn else f"losses, {mode}"
        try:
            run = complete(job_path, [*variants[mode], f"log.every_steps={every}", place], what)
        except RunEnded as error:
            if error.args[1] != WRONG_JOB or mode in NEEDED:
                raise
            refused[mode] = error.args[0].removeprefix(f"{what}: ")
            print(f"{what}: refused", file=sys.stderr, flush=True)
            continue
        lines = [line for line in read_lines(run.metrics) if line["kind"] == "train"]
        if every == 1 and mode != NO_SYNC:
            losses.setdefault(mode, [line["loss"] for line in lines])
        if turn:
            facts = measure(run, lines, warm_up)
            timed.setdefault(mode, []).append(facts)
            what += f": {facts['speed']:,.0f} samples/s"
        print(what, file=sys.stderr, flush=True)
        rmtree(run.checkpoints, ignore_errors=True)  # of a few steps, and as large as the model
    devices = {item["device"] for items in timed.values() for item in items}
    if len(devices) > 1:
        raise RunEnded(f"the modes ran on {' and '.join(sorted(devices))}: set device=cpu or device=cuda", FAILED)
    return losses, timed


def measure(run: RunFolder, lines: Sequence[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """What a run measured: samples/s, peak memory and bytes of each rank, and its losses by seconds."""
    result, training = read_json(run.result), last_event(run.read_events(), "training")
    assert result and training
    curve = [(line["time"] - lines[0]["time"], line["mean_loss"]) for line in lines]
    return {
        "speed": speed(lines, warm_up, training["steps_per_epoch"]), "device": result["device"],
        "memory": result["peak_memory_mb"], "traffic": result["traffic_bytes"], "curve": curve,
    }  # fmt: skip


def complete(job_path: str, words: Sequence[str], what: str) -> RunFolder:
    """Submit a run and wait for its end; Ctrl-C stops it. Raises RunEnded: it did not get to its end."""
    run = submit_job(job_path, words, "local", None)
    _, ask = control.status_of(run)
    try:
        while ask().is_active:
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        with contextlib.suppress(JobError):
            control.cancel(str(run))
        raise
    status = control.status(str(run))
    if status["state"] != Phase.DONE:
        reason = status["reason"] or f"its logs are in {run.logs}"
        raise RunEnded(f"{what}: {status['state']}: {reason}", status["code"] or FAILED)
    return run


def speed(lines: Sequence[dict[str, Any]], warm_up: int, steps_per_epoch: int) -> float:
    """The median samples/s of the lines of `metrics.jsonl` after `warm_up` steps.

    Lines in which an epoch or the run ends are left out where others remain: they hold what happens only then.
    """
    counted = [(before["step"], line) for before, line in pairwise(lines) if before["step"] >= warm_up]
    within = ((step, line) for step, line in counted if step // steps_per_epoch == line["step"] // steps_per_epoch)
    steady = [(step, line) for step, line in within if line is not lines[-1]]
    return float(statistics.median(line["samples_per_s"] for _, line in steady or counted))
