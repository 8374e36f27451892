"""`muster compare`: runs the same job as single, DP and DDP for a few steps, as ordinary local runs.

What their numbers mean is in `trainer.launch.compare.verdict`.
"""

import contextlib
import importlib
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

from trainer.config.job import Ddp, Job
from trainer.config.load import merge_job, to_job, to_text, valid_keys
from trainer.errors import DONE, FAILED, JobError
from trainer.launch import control
from trainer.launch.compare.verdict import MODES, summarize, text
from trainer.launch.platform import Phase
from trainer.launch.submit import refuse_run, submit_job
from trainer.records import read_json, read_lines, write_json
from trainer.run.folder import RunFolder, last_event
from trainer.wiring.devices import visible_devices, wanted_devices
from trainer.wiring.hardware import usable_processors

WARM_UP_STEPS = 10
"""At least so many first steps of a run do not count: they fill caches and arrange DDP's buckets."""
NEVER = 10**9
NO_SYNC = "ddp without synchronisation"
POLL_S = 0.2


class RunEnded(Exception):
    """A run did not reach its end: why, and the exit code."""


def compare(job_path: str, overrides: Sequence[str], steps: int, rounds: int, as_json: bool) -> int:
    """Run, print and write `compare.json`, `compare.png` and the runs into one folder; return the exit code.

    `steps`: of each run that count; `rounds`: timed runs of each mode. Raises JobError: some mode refuses the job.
    """
    for key, value in (("--steps", steps), ("--rounds", rounds)):
        if value < 1:
            raise JobError(key, value, "must be at least 1", "Leave it out for the default")
    window = -(-steps // 10)
    warm_up = window * -(-WARM_UP_STEPS // window)
    job, variants, refused = plan(job_path, overrides, warm_up + steps)
    config, beside = to_text(merge_job(job_path, overrides)), Path(job_path).resolve().parent
    run = RunFolder.create(job.runs, f"{job.name}-compare", config, beside)
    run.job.unlink()  # a comparison is not a run
    folder = run.path
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        every = window if wanted_devices(job, visible_devices()) else 1
        losses, timed = _run_all(job_path, variants, folder, rounds, every, warm_up)
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
    print(json.dumps(result) if as_json else text(result))
    drawn = plot(result, losses, folder / "compare.png")
    print(f"{folder}: {drawn}", file=sys.stderr if as_json else sys.stdout)
    return DONE


def plan(job_path: str, overrides: Sequence[str], total: int) -> tuple[Job, dict[str, list[str]], str]:
    """The job as DDP sees it, the `key=value` words of each variant, and why there is none without synchronisation.

    `total`: steps of each run. Raises JobError: a script, one device, several nodes, or what a mode refuses.
    """
    refuse_run(job_path)
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
    job = to_job(merge_job(job_path, [*overrides, "parallel=ddp"]))
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
    defaults = {key: item.default for key, item in valid_keys(Ddp, "ddp.")}
    plain = [f"{key}={'null' if value is None else value}" for key, value in defaults.items()]
    primary = [f"devices=[{job.devices[0]}]"] if job.devices else []
    common = [*overrides, *common]
    variants = {
        "single": [*common, *plain, "parallel=single", "nodes=1", "devices_per_node=1", *primary],
        "dp": [*common, *plain, "parallel=dp"],
        "ddp": [*common, "parallel=ddp"],
    }
    for words in variants.values():
        to_job(merge_job(job_path, words))
    without = [*variants["ddp"], f"ddp.sync_every={NEVER}", "ddp.sync_start=0"]
    try:
        to_job(merge_job(job_path, without))
    except JobError as error:
        return job, variants, str(error)
    return job, variants | {NO_SYNC: without}, ""


def _run_all(
    job_path: str, variants: dict[str, list[str]], folder: Path, rounds: int, window: int, warm_up: int
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, Any]]]]:
    """The loss of each step of each mode, and of each timed run samples/s, device type and peak memory by device.

    `window`: steps between two lines of `metrics.jsonl`. Where it is more than one, the losses come from a round of
    their own: to read the loss of each step makes a GPU wait for it. Raises RunEnded: a run failed or was stopped.
    """
    place = f"runs={json.dumps(str(folder / 'runs'))}"
    turns = [(0, mode, 1) for mode in MODES] if window > 1 else []
    turns += [(turn, mode, window) for turn in range(1, rounds + 1) for mode in variants]
    losses: dict[str, list[float]] = {}
    timed: dict[str, list[dict[str, Any]]] = {}
    for turn, mode, every in turns:
        what = f"round {turn} of {rounds}, {mode}" if turn else f"losses, {mode}"
        run = complete(job_path, [*variants[mode], f"log.every_steps={every}", place], what)
        lines = [line for line in read_lines(run.metrics) if line["kind"] == "train"]
        if every == 1 and mode in MODES:
            losses.setdefault(mode, [line["loss"] for line in lines])
        if turn:
            result, training = read_json(run.result), last_event(run.read_events(), "training")
            assert result and training
            measured = speed(lines, warm_up, training["steps_per_epoch"])
            facts = {"speed": measured, "device": result["device"], "memory": result["peak_memory_mb"]}
            timed.setdefault(mode, []).append(facts)
            what += f": {measured:,.0f} samples/s"
        print(what, file=sys.stderr, flush=True)
        rmtree(run.checkpoints, ignore_errors=True)  # of a few steps, and as large as the model
    devices = {item["device"] for items in timed.values() for item in items}
    if len(devices) > 1:
        raise RunEnded(f"the modes ran on {' and '.join(sorted(devices))}: set device=cpu or device=cuda", FAILED)
    return losses, timed


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


def plot(result: dict[str, Any], losses: dict[str, list[float]], path: Path) -> str:
    """Draw speed, memory and losses; return what was written, in words."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(12, 4), layout="constrained")
    except ImportError:
        return 'compare.json; no plot without matplotlib: pip install "muster-train[plot]"'
    speeds, memory, curves = figure.subplots(1, 3)
    for place, (mode, item) in enumerate(result["modes"].items()):
        speeds.bar(place, item["samples_per_s"])
        speeds.plot([place] * len(item["rounds"]), item["rounds"], "k.")
        width = 0.8 / len(item["peak_memory_mb"])
        for part, device in enumerate(item["peak_memory_mb"]):
            memory.bar(place - 0.4 + (part + 0.5) * width, device["peak_mb"], 0.9 * width, color=f"C{place}")
        curves.plot(range(1, 1 + len(losses[mode])), losses[mode], ("-", "--", ":")[place], label=mode)
    for axes in (speeds, memory):
        axes.set_xticks(range(len(MODES)), MODES)
    speeds.set_title("samples/s (dots: rounds)")
    where = "memory per device" if result["device"] == "cuda" else "resident memory per process"
    memory.set_title(f"peak {where}, MiB")
    curves.set_title("loss by step")
    curves.legend()
    figure.suptitle(f"{result['job']}: {result['devices']} {result['device']} devices, batch {result['batch_size']}")
    figure.savefig(path)
    return "compare.json, compare.png"
