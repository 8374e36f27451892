"""Which settings contradict each other: one table, checked on the whole job before anything is started.

A rule is broken when its condition holds. `problem` may name fields of the job, as in {job.nodes}.
"""

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from trainer.config.job import Ddp, Fsdp, Job, Pipeline, Server
from trainer.config.user_code import MissingModule, check_symbol, find_source
from trainer.errors import JobError, wrong_choice

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
MODULE_NAME = re.compile(r"\w+(\.\w+)*")
OPTIMIZERS = ("adamw", "adam", "sgd")
OPTIONS = {"ddp": Ddp, "fsdp": Fsdp, "pipeline": Pipeline, "server": Server}
"""Modes that have a section of their own in the job, of the same name."""
SCHEDULES = ("constant", "cosine", "linear")


class Rule(NamedTuple):
    """What must not be."""

    key: str
    broken: Callable[[Job], Any]
    problem: str
    remedy: str


WHAT_TO_RUN = (
    Rule("name", lambda job: not NAME.fullmatch(job.name), "cannot be part of a folder's and a host's name",
         "Use 1 to 63 letters, digits, '.', '_' and '-', beginning and ending with a letter or digit"),
    Rule("script", lambda job: job.task and job.script, "contradicts task={job.task!r}", "Keep one of the two"),
    Rule("task", lambda job: not job.task and not job.script, "the job does not say what to run",
         "Set task: package.module:Class, or script: train.py"),
    Rule("parallel", lambda job: job.script and job.parallel not in ("auto", "ddp", "fsdp"),
         "the script decides that itself",
         "Remove the key from the job"),
    Rule("script_args", lambda job: job.script_args and not job.script, "would be ignored: there is no script",
         "Use task_args for a task"),
    Rule("preload", lambda job: not all(map(MODULE_NAME.fullmatch, job.preload)), "are not names of modules",
         "Write them as after `import`, for example [transformers.trainer]"),
    Rule("devices", lambda job: job.devices is not None and (
             not job.devices or min(job.devices) < 0 or len(set(job.devices)) < len(job.devices)),
         "must be different device numbers from 0 up", "For example devices=[2,3,1]: the first one is the primary"),
    Rule("devices", lambda job: job.devices is not None and job.nodes > 1,
         "physical devices can be chosen on one node only",
         "Remove it: on several nodes the scheduler chooses; set devices_per_node"),
    Rule("devices_per_node", lambda job: job.devices is not None and job.devices_per_node not in (1, len(job.devices)),
         "contradicts devices={job.devices}", "Remove devices_per_node: it follows from devices"),
)  # fmt: skip

MODES = (
    Rule("nodes", lambda job: job.parallel == "single" and job.nodes > 1,
         "parallel=single uses one device on one node", "Use parallel=ddp, or set it to 1"),
    Rule("devices_per_node", lambda job: job.parallel == "single" and job.devices_per_node > 1,
         "parallel=single uses one device on one node", "Use parallel=ddp, or set it to 1"),
    Rule("nodes", lambda job: job.parallel == "dp" and job.nodes > 1, "DataParallel (parallel=dp) works on one node",
         "Use parallel=ddp for several nodes"),
    Rule("devices_per_node", lambda job: job.parallel == "server" and job.world_size == 1,
         "leaves a parameter server without others", "Set it to 2 or more, or use parallel=single"),
    Rule("devices_per_node", lambda job: job.parallel == "pipeline" and job.world_size == 1,
         "leaves a pipeline with one stage", "Set it to 2 or more, or use parallel=single"),
    Rule("train.compile", lambda job: job.parallel == "dp" and job.train.compile,
         "torch cannot compile what DataParallel replicates", "Use parallel=ddp, or remove it"),
)  # fmt: skip

TRAINING = (
    Rule("ddp.static_graph", lambda job: job.ddp.static_graph and job.train.accumulate > 1,
         "with train.accumulate={job.train.accumulate} torch's reducer asserts or stops averaging (pytorch#187732)",
         "Set ddp.static_graph=false"),
    Rule("ddp.static_graph", lambda job: job.ddp.static_graph and job.ddp.find_unused_parameters,
         "contradicts ddp.find_unused_parameters=true", "Keep one of them"),
    Rule("train.on_nan", lambda job: job.ddp.compression == "powersgd" and job.train.on_nan == "skip",
         "PowerSGD carries the errors of a step into the next one, so a NaN would stay",
         "Set train.on_nan=halt, or another ddp.compression"),
    Rule("ddp.sync_start", lambda job: job.ddp.sync_start and job.ddp.sync_every == 1,
         "would be ignored: gradients are averaged at every step", "Set ddp.sync_every above 1"),
    Rule("ddp.powersgd_rank", lambda job: job.ddp.powersgd_rank != Ddp().powersgd_rank
         and job.ddp.compression != "powersgd", "would be ignored", "Set ddp.compression=powersgd"),
    Rule("ddp.compression", lambda job: job.train.precision == "float64" and job.ddp.compression in ("bf16", "fp16"),
         "discards the extra digits of float64", "Set it to none"),
    Rule("train.precision", lambda job: job.train.precision == "fp16" and job.device == "cpu",
         "needs a GPU: CPU kernels lack it", "Use bf16 or float32"),
    Rule("ddp.sync_batchnorm", lambda job: job.ddp.sync_batchnorm and job.device == "cpu",
         "torch implements it for GPUs only", "Remove it, or device=cuda"),
    Rule("checkpoint.best_mode", lambda job: job.checkpoint.best_mode != "max" and job.checkpoint.best is None,
         "would be ignored", "Name the metric in checkpoint.best"),
    Rule("checkpoint.strict", lambda job: not job.checkpoint.strict and job.checkpoint.load is None,
         "would be ignored", "Name the weights in checkpoint.load"),
    Rule("log.profile_steps", lambda job: (steps := job.log.profile_steps) and not (
             len(steps) == 2 and 1 <= steps[0] <= steps[1]),
         "must be [first, last], counted from 1", "For example log.profile_steps=[10,12]"),
    Rule("train.schedule", lambda job: job.train.schedule.startswith("torch.optim.lr_scheduler:"),
         "is a torch scheduler, which counts steps by itself and changes an optimizer",
         "Use cosine, linear or constant with train.warmup_steps, or a function (step, steps) -> factor"),
    Rule("train.optimizer_args.lr", lambda job: "lr" in job.train.optimizer_args, "is set twice", "Use train.lr"),
    Rule("train.optimizer_args.weight_decay", lambda job: "weight_decay" in job.train.optimizer_args,
         "is set twice", "Use train.weight_decay"),
)  # fmt: skip

SHARDED = (  # no rank has a whole weight
    Rule("train.ema_decay", lambda job: job.train.ema_decay is not None,
         "with parallel=fsdp each rank would hold the whole average", "Remove it, or use parallel=ddp"),
    Rule("train.channels_last", lambda job: job.train.channels_last,
         "fully_shard cuts weights along their first dimension, and takes no other layout",
         "Set it to false, or use parallel=ddp"),
    Rule("fsdp.gather", lambda job: job.fsdp.gather == "half" and job.train.precision not in ("bf16", "fp16"),
         "contradicts train.precision={job.train.precision}", "Set train.precision=bf16, or fsdp.gather=full"),
    Rule("fsdp.replicate", lambda job: job.fsdp.replicate == "node" and job.nodes == 1,
         "would be ignored: there is one node", "Remove it"),
    Rule("fsdp.replicate", lambda job: job.fsdp.replicate == "node" and job.devices_per_node == 1,
         "leaves nothing to shard: each node has one device", "Set it to none, or use parallel=ddp"),
)  # fmt: skip

LOCAL_SGD = (  # ranks differ between two averages, so nothing may depend on their being equal
    Rule("ddp.compression", lambda job: job.ddp.compression != "none",
         "post-local SGD (ddp.sync_every) averages weights, which it would not compress",
         "Set ddp.compression=none, or ddp.sync_every=1"),
    Rule("ddp.static_graph", lambda job: job.ddp.static_graph,
         "torch's reducer asserts in the steps of post-local SGD", "Set it to false, or ddp.sync_every=1"),
    Rule("train.on_nan", lambda job: job.train.on_nan == "skip",
         "with post-local SGD the ranks do not agree on every step", "Set train.on_nan=halt, or ddp.sync_every=1"),
    Rule("train.ema_decay", lambda job: job.train.ema_decay is not None,
         "with post-local SGD each rank would average different weights", "Remove it, or ddp.sync_every=1"),
    Rule("train.precision", lambda job: job.train.precision == "fp16",
         "with post-local SGD the loss scales of the ranks would diverge", "Use bf16, or ddp.sync_every=1"),
)  # fmt: skip


PIPELINE = (
    Rule("pipeline.stages", lambda job: job.world_size % (job.pipeline.stages or 1),
         "does not divide the {job.world_size} devices", "Give each stage of each pipeline a device"),
    Rule("pipeline.microbatches", lambda job: job.pipeline.schedule == "1f1b"
         and (job.pipeline.microbatches or 0) < (job.pipeline.stages or 0),
         "is less than the {job.pipeline.stages} stages, some of which would have nothing to do",
         "Use {job.pipeline.stages} or more, or pipeline.schedule=gpipe"),
    Rule("train.precision", lambda job: job.train.precision == "fp16",
         "scales losses, and the stages of a pipeline would not agree on a scale", "Use bf16, or parallel=ddp"),
    Rule("train.ema_decay", lambda job: job.train.ema_decay is not None,
         "is not implemented for a model in stages", "Remove it, or use parallel=ddp"),
    Rule("train.compile", lambda job: job.train.compile,
         "is not implemented for a model in stages", "Remove it, or use parallel=ddp"),
)  # fmt: skip

SERVER = (
    Rule("train.precision", lambda job: job.train.precision == "fp16",
         "scales losses on each rank, and a parameter server updates on one", "Use bf16, or parallel=ddp"),
)  # fmt: skip

ASYNCHRONOUS = (
    Rule("train.ema_decay", lambda job: job.train.ema_decay is not None,
         "needs all weights after each update, and an asynchronous server does not send them all",
         "Remove it, or server.synchronous=true"),
)  # fmt: skip


def check_job(job: Job, code_is_here: bool = True) -> None:
    """Complete `parallel: auto` and refuse what cannot work. Raises JobError: with key, value and remedy.

    `code_is_here`: whether the user's modules must be on this machine; those that are there are checked anyway.
    """
    _check(job, WHAT_TO_RUN)
    if job.devices is not None:
        job.devices_per_node = len(job.devices)
    if job.script and job.parallel != "fsdp":
        job.parallel = "ddp"
    if job.parallel == "auto":
        job.parallel = "ddp" if job.nodes * job.devices_per_node > 1 else "single"
    _check(job, MODES)
    for mode, kind in OPTIONS.items():
        for name, value in vars(getattr(job, mode)).items():
            if job.parallel != mode and value != getattr(kind(), name):
                problem = f"would be ignored with parallel={job.parallel}"
                raise JobError(f"{mode}.{name}", value, problem, f"Use parallel={mode}, or remove it")
    if job.task:
        _check(job, TRAINING)
        if job.parallel == "fsdp":
            _check(job, SHARDED)
        if job.ddp.sync_every > 1:
            _check(job, LOCAL_SGD)
        if job.parallel == "pipeline":
            job.pipeline.stages = job.pipeline.stages or job.world_size
            job.pipeline.microbatches = job.pipeline.microbatches or job.pipeline.stages
            _check(job, PIPELINE)
        if job.parallel == "server":
            _check(job, SERVER if job.server.synchronous else SERVER + ASYNCHRONOUS)
        _check_batch(job)
        _check_code("task", job.task, job.task_args, code_is_here)
        for key, known in {"train.optimizer": OPTIMIZERS, "train.schedule": SCHEDULES}.items():
            value = operator.attrgetter(key)(job)
            if value not in known and ":" not in value:
                raise wrong_choice(key, value, known, "Or give package.module:callable")
            if value not in known:
                _check_code(key, value, None, code_is_here)


def _check_code(key: str, value: str, arguments: dict[str, Any] | None, is_here: bool) -> None:
    try:
        check_symbol(key, value, arguments)
    except MissingModule:
        if is_here or find_source(
            value.partition(":")[0].partition(".")[0]
        ):  # a package that is here lacks that module
            raise


def _check(job: Job, rules: tuple[Rule, ...]) -> None:
    for rule in rules:
        if rule.broken(job):
            value: Any = job
            for name in rule.key.split("."):
                value = value[name] if isinstance(value, dict) else getattr(value, name)
            raise JobError(rule.key, value, rule.problem.format(job=job), rule.remedy.format(job=job))


def _check_batch(job: Job) -> None:
    """Refuse a global batch that does not divide, naming the nearest sizes that do."""
    batch, parts = job.train.batch_size, job.parts * job.train.accumulate
    among = f"{job.parts} ranks x {job.train.accumulate} micro-batches"
    if job.parallel == "pipeline":
        parts *= job.pipeline.microbatches or 1
        among = f"{job.parts} pipelines x {parts // job.parts} micro-batches"
    if job.parallel == "dp" and batch // parts < job.devices_per_node:
        problem = f"is too small: {job.devices_per_node} devices would not all get a sample of each micro-batch"
        remedy = f"Use at least {job.devices_per_node * parts}, or fewer devices"
        raise JobError("train.batch_size", batch, problem, remedy)
    if batch % parts:
        below = batch // parts * parts
        problem = f"does not divide among {among}"
        smaller = f"{below} or " if below else ""
        raise JobError("train.batch_size", batch, problem, f"The nearest sizes that do: {smaller}{below + parts}")
