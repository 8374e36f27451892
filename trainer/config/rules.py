"""Which settings contradict each other: checked on the whole job, before anything is started."""

from __future__ import annotations

import dataclasses
import difflib
import re

from trainer.config.job import Ddp, Job
from trainer.config.user_code import check_symbol
from trainer.errors import JobError

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def check_job(job: Job) -> None:
    """Complete `parallel: auto` and refuse what cannot work.

    Raises:
        JobError: with key, value and remedy.
    """
    if not NAME.fullmatch(job.name):
        raise JobError(
            "name",
            job.name,
            "cannot be part of a folder's and a host's name",
            "Use 1 to 63 letters, digits, '.', '_' and '-', beginning and ending with a letter or digit",
        )
    _check_what(job)
    _check_devices(job)
    _check_parallel(job)
    if job.task:
        _check_training(job)
        check_batch(job)
        _check_names(job)


def _check_what(job: Job) -> None:
    if job.task and job.script:
        raise JobError("script", job.script, f"contradicts task={job.task!r}", "Keep one of the two")
    if not job.task and not job.script:
        raise JobError(
            "task", job.task, "the job says nothing to run", "Set task: package.module:Class, or script: train.py"
        )
    if job.script and job.parallel not in ("auto", "ddp"):
        raise JobError("parallel", job.parallel, "a script decides that itself", "Remove the key from the job")
    if job.script_args and not job.script:
        raise JobError(
            "script_args", job.script_args, "would be ignored: there is no script", "Use task_args for a task"
        )


def _check_devices(job: Job) -> None:
    if job.devices is None:
        return
    if not job.devices or len(set(job.devices)) != len(job.devices) or min(job.devices) < 0:
        raise JobError(
            "devices",
            job.devices,
            "must be different device numbers from 0 up",
            "For example devices=[2,3,1]: the first one is the primary",
        )
    if job.nodes > 1:
        raise JobError(
            "devices",
            job.devices,
            "physical devices can be chosen on one node only",
            "Remove it: on several nodes the scheduler chooses; set devices_per_node",
        )
    if job.devices_per_node not in (1, len(job.devices)):
        raise JobError(
            "devices_per_node",
            job.devices_per_node,
            f"contradicts devices={job.devices}",
            "Remove devices_per_node: it follows from devices",
        )
    job.devices_per_node = len(job.devices)


def _check_parallel(job: Job) -> None:
    total = job.nodes * job.devices_per_node
    if job.script:
        job.parallel = "ddp"
    if job.parallel == "auto":
        job.parallel = "ddp" if total > 1 else "single"
    if job.parallel == "single" and total > 1:
        key = "nodes" if job.nodes > 1 else "devices_per_node"
        raise JobError(
            key, getattr(job, key), "parallel=single uses one device on one node", "Use parallel=ddp, or set it to 1"
        )
    if job.parallel == "dp" and job.nodes > 1:
        raise JobError(
            "nodes", job.nodes, "DataParallel (parallel=dp) works on one node", "Use parallel=ddp for several nodes"
        )
    if job.parallel == "dp" and job.train.compile:
        raise JobError(
            "train.compile", True, "torch cannot compile what DataParallel replicates", "Use parallel=ddp, or remove it"
        )
    if job.parallel != "ddp":
        default = Ddp()
        for item in dataclasses.fields(Ddp):
            if getattr(job.ddp, item.name) != getattr(default, item.name):
                raise JobError(
                    f"ddp.{item.name}",
                    getattr(job.ddp, item.name),
                    f"would be ignored with parallel={job.parallel}",
                    "Use parallel=ddp, or remove it",
                )


def _check_training(job: Job) -> None:
    train, ddp = job.train, job.ddp
    if ddp.static_graph and train.accumulate > 1:
        raise JobError(
            "ddp.static_graph",
            True,
            f"with train.accumulate={train.accumulate} torch's reducer asserts or stops averaging (pytorch#187732)",
            "Set ddp.static_graph=false",
        )
    if ddp.static_graph and ddp.find_unused_parameters:
        raise JobError("ddp.static_graph", True, "contradicts ddp.find_unused_parameters=true", "Keep one of them")
    if ddp.sync_every > 1:
        _check_local(job)
    if ddp.compression == "powersgd" and train.on_nan == "skip":
        raise JobError(
            "train.on_nan",
            "skip",
            "PowerSGD adds the errors of a step to the next one: one NaN would stay",
            "Set train.on_nan=halt, or another ddp.compression",
        )
    if ddp.sync_start and ddp.sync_every == 1:
        raise JobError(
            "ddp.sync_start",
            ddp.sync_start,
            "would be ignored: gradients are averaged at every step",
            "Set ddp.sync_every above 1",
        )
    if ddp.powersgd_rank != Ddp().powersgd_rank and ddp.compression != "powersgd":
        raise JobError("ddp.powersgd_rank", ddp.powersgd_rank, "would be ignored", "Set ddp.compression=powersgd")
    if train.precision == "float64" and ddp.compression in ("bf16", "fp16"):
        raise JobError("ddp.compression", ddp.compression, "throws float64's digits away", "Set it to none")
    if train.precision == "fp16" and job.device == "cpu":
        raise JobError("train.precision", "fp16", "needs a GPU: CPU kernels lack it", "Use bf16 or float32")
    if ddp.sync_batchnorm and job.device == "cpu":
        raise JobError("ddp.sync_batchnorm", True, "torch implements it for GPUs only", "Remove it, or device=cuda")
    if job.checkpoint.best_mode != "max" and job.checkpoint.best is None:
        raise JobError(
            "checkpoint.best_mode", job.checkpoint.best_mode, "would be ignored", "Name the metric in checkpoint.best"
        )
    span = job.log.profile_steps
    if span and (len(span) != 2 or not 1 <= span[0] <= span[1]):
        raise JobError(
            "log.profile_steps", span, "must be [first, last], counted from 1", "For example log.profile_steps=[10,12]"
        )
    for key in ("lr", "weight_decay"):
        if key in train.optimizer_args:
            raise JobError(f"train.optimizer_args.{key}", train.optimizer_args[key], "is set twice", f"Use train.{key}")


def _check_local(job: Job) -> None:
    """Post-local SGD: ranks differ between two averages, so nothing may depend on their being equal."""
    train, ddp, why = job.train, job.ddp, "or ddp.sync_every=1"
    if ddp.compression != "none":
        raise JobError(
            "ddp.compression",
            ddp.compression,
            "post-local SGD (ddp.sync_every) averages weights, which it would not compress",
            f"Set ddp.compression=none, {why}",
        )
    if ddp.static_graph:
        raise JobError(
            "ddp.static_graph",
            True,
            "torch's reducer asserts in the steps of post-local SGD",
            f"Set it to false, {why}",
        )
    if train.on_nan == "skip":
        raise JobError(
            "train.on_nan", "skip", "ranks cannot agree on each step of post-local SGD", f"Set train.on_nan=halt, {why}"
        )
    if train.ema_decay is not None:
        raise JobError(
            "train.ema_decay",
            train.ema_decay,
            "each rank of post-local SGD would average other weights",
            f"Remove it, {why}",
        )
    if train.precision == "fp16":
        raise JobError(
            "train.precision", "fp16", "the loss scales of ranks would part under post-local SGD", f"Use bf16, {why}"
        )


def check_batch(job: Job) -> None:
    """Refuse a global batch that does not divide, naming the nearest sizes that do."""
    batch, parts = job.train.batch_size, job.world_size * job.train.accumulate
    if job.parallel == "dp":
        parts = job.train.accumulate
        if batch // parts < job.devices_per_node:
            raise JobError(
                "train.batch_size",
                batch,
                f"is too small: {job.devices_per_node} devices of a micro-batch would not all get a sample",
                f"Use at least {job.devices_per_node * parts}, or fewer devices",
            )
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        nearest = f"{below} or {above}" if below else str(above)
        raise JobError(
            "train.batch_size",
            batch,
            f"does not divide among {job.world_size} ranks x {job.train.accumulate} micro-batches",
            f"The nearest sizes that do: {nearest}",
        )


def _check_names(job: Job) -> None:
    assert job.task
    check_symbol("task", job.task, job.task_args)
    for key, value, known in (
        ("train.optimizer", job.train.optimizer, ("adamw", "adam", "sgd")),
        ("train.schedule", job.train.schedule, ("constant", "cosine", "linear")),
    ):
        if value in known:
            continue
        if ":" not in value:
            near = difflib.get_close_matches(value, known, 1)
            raise JobError(
                key,
                value,
                "is none of " + ", ".join(known),
                f"Did you mean {near[0]}?" if near else "Or give package.module:callable",
            )
        check_symbol(key, value, None)
