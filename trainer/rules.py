"""Which settings contradict each other: checked on the whole job, before anything is started."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config import Ddp, Job
from trainer.errors import JobError

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def check_job(job: Job) -> None:
    """Complete `parallel: auto` and refuse what cannot work.

    Raises:
        JobError: with key, value and remedy.
    """
    if not NAME.fullmatch(job.name):
        raise JobError("name", job.name, "cannot be part of a folder's and a host's name",
                       "Use 1 to 63 letters, digits, '.', '_' and '-', beginning and ending with a letter or digit")
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
        raise JobError("task", job.task, "the job says nothing to run",
                       "Set task: package.module:Class, or script: train.py")
    if job.script and job.parallel not in ("auto", "ddp"):
        raise JobError("parallel", job.parallel, "a script decides that itself", "Remove the key from the job")
    if job.script_args and not job.script:
        raise JobError("script_args", job.script_args, "would be ignored: there is no script",
                       "Use task_args for a task")


def _check_devices(job: Job) -> None:
    if job.devices is None:
        return
    if not job.devices or len(set(job.devices)) != len(job.devices) or min(job.devices) < 0:
        raise JobError("devices", job.devices, "must be different device numbers from 0 up",
                       "For example devices=[2,3,1]: the first one is the primary")
    if job.nodes > 1:
        raise JobError("devices", job.devices, "physical devices can be chosen on one node only",
                       "Remove it: on several nodes the scheduler chooses; set devices_per_node")
    if job.devices_per_node not in (1, len(job.devices)):
        raise JobError("devices_per_node", job.devices_per_node, f"contradicts devices={job.devices}",
                       "Remove devices_per_node: it follows from devices")
    job.devices_per_node = len(job.devices)


def _check_parallel(job: Job) -> None:
    total = job.nodes * job.devices_per_node
    if job.script:
        job.parallel = "ddp"
    if job.parallel == "auto":
        job.parallel = "ddp" if total > 1 else "single"
    if job.parallel == "single" and total > 1:
        key = "nodes" if job.nodes > 1 else "devices_per_node"
        raise JobError(key, getattr(job, key), "parallel=single uses one device on one node",
                       "Use parallel=ddp, or set it to 1")
    if job.parallel == "dp" and job.nodes > 1:
        raise JobError("nodes", job.nodes, "DataParallel (parallel=dp) works on one node",
                       "Use parallel=ddp for several nodes")
    if job.parallel != "ddp":
        default = Ddp()
        for item in dataclasses.fields(Ddp):
            if getattr(job.ddp, item.name) != getattr(default, item.name):
                raise JobError(f"ddp.{item.name}", getattr(job.ddp, item.name),
                               f"would be ignored with parallel={job.parallel}", "Use parallel=ddp, or remove it")


def _check_training(job: Job) -> None:
    train, ddp = job.train, job.ddp
    if ddp.static_graph and train.accumulate > 1:
        raise JobError("ddp.static_graph", True, f"with train.accumulate={train.accumulate} torch's reducer "
                       "asserts or stops averaging (pytorch#187732)", "Set ddp.static_graph=false")
    if ddp.static_graph and ddp.find_unused_parameters:
        raise JobError("ddp.static_graph", True, "contradicts ddp.find_unused_parameters=true", "Keep one of them")
    if ddp.sync_every > 1 and ddp.compression != "none":
        raise JobError("ddp.compression", ddp.compression, "post-local SGD (ddp.sync_every) has its own hook",
                       "Set ddp.compression=none, or ddp.sync_every=1")
    if ddp.sync_every > 1 and train.on_nan == "skip":
        raise JobError("train.on_nan", "skip", "ranks cannot agree on each step under post-local SGD",
                       "Set train.on_nan=halt, or ddp.sync_every=1")
    if ddp.sync_start and ddp.sync_every == 1:
        raise JobError("ddp.sync_start", ddp.sync_start, "would be ignored: gradients are averaged at every step",
                       "Set ddp.sync_every above 1")
    if ddp.powersgd_rank != Ddp().powersgd_rank and ddp.compression != "powersgd":
        raise JobError("ddp.powersgd_rank", ddp.powersgd_rank, "would be ignored",
                       "Set ddp.compression=powersgd")
    if train.precision == "float64" and ddp.compression in ("bf16", "fp16"):
        raise JobError("ddp.compression", ddp.compression, "throws float64's digits away", "Set it to none")
    if train.precision == "fp16" and job.device == "cpu":
        raise JobError("train.precision", "fp16", "needs a GPU: CPU kernels lack it", "Use bf16 or float32")
    if ddp.sync_batchnorm and job.device == "cpu":
        raise JobError("ddp.sync_batchnorm", True, "torch implements it for GPUs only", "Remove it, or device=cuda")
    if job.checkpoint.best_mode != "max" and job.checkpoint.best is None:
        raise JobError("checkpoint.best_mode", job.checkpoint.best_mode, "would be ignored",
                       "Name the metric in checkpoint.best")
    span = job.log.profile_steps
    if span and (len(span) != 2 or not 0 <= span[0] <= span[1]):
        raise JobError("log.profile_steps", span, "must be [first, last]", "For example log.profile_steps=[10,12]")
    for key in ("lr", "weight_decay"):
        if key in train.optimizer_args:
            raise JobError(f"train.optimizer_args.{key}", train.optimizer_args[key], "is set twice",
                           f"Use train.{key}")


def check_batch(job: Job) -> None:
    """Refuse a global batch that does not divide, naming the nearest sizes that do."""
    batch, parts = job.train.batch_size, job.world_size * job.train.accumulate
    if job.parallel == "dp":
        parts = job.train.accumulate
        if batch // parts < job.devices_per_node:
            raise JobError("train.batch_size", batch, f"is too small: {job.devices_per_node} devices of a "
                           "micro-batch would not all get a sample",
                           f"Use at least {job.devices_per_node * parts}, or fewer devices")
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        nearest = f"{below} or {above}" if below else str(above)
        raise JobError("train.batch_size", batch, f"does not divide among {job.world_size} ranks x "
                       f"{job.train.accumulate} micro-batches", f"The nearest sizes that do: {nearest}")


def _check_names(job: Job) -> None:
    assert job.task
    _check_symbol("task", job.task, job.task_args)
    for key, value, known in (("train.optimizer", job.train.optimizer, ("adamw", "adam", "sgd")),
                              ("train.schedule", job.train.schedule, ("constant", "cosine", "linear"))):
        if value in known:
            continue
        if ":" not in value:
            near = difflib.get_close_matches(value, known, 1)
            raise JobError(key, value, "is none of " + ", ".join(known),
                           f"Did you mean {near[0]}?" if near else "Or give package.module:callable")
        _check_symbol(key, value, None)


def _check_symbol(key: str, value: str, arguments: dict[str, Any] | None) -> None:
    """Find `package.module:Name` by reading its source: nothing of the user's is run on the submitting side."""
    module, _, name = value.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not name.isidentifier():
        raise JobError(key, value, "is not package.module:Name", "For example trainer.tasks.digits:Digits")
    source = find_source(module)
    if source is None:
        raise JobError(key, value, f"no module {module}", "It must be importable from the working directory "
                       f"({os.getcwd()}) or the job file's folder")
    if source.suffix != ".py":
        return
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise JobError(key, value, f"{source.name} line {error.lineno}: {error.msg}", "Correct the source") from None
    found = {item.name: item for item in tree.body if isinstance(item, (ast.ClassDef, ast.FunctionDef))}
    if name not in found:
        if {name, "*"} & _other_names(tree):  # looked up for real when the ranks import it
            return
        near = difflib.get_close_matches(name, found, 1)
        raise JobError(key, value, f"{source.name} defines no {name}",
                       f"Did you mean {module}:{near[0]}?" if near else "It defines: " + ", ".join(found))
    item = found[name]
    if arguments is not None and isinstance(item, ast.ClassDef):
        _check_arguments(item, arguments)


def _other_names(tree: ast.Module) -> set[str]:
    """Names that a module imports or assigns; `*` when it star-imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _check_arguments(item: ast.ClassDef, arguments: dict[str, Any]) -> None:
    start = next((part for part in item.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if start is None or start.args.kwarg is not None:
        return
    names = [argument.arg for argument in (*start.args.args[1:], *start.args.kwonlyargs)]
    for key, value in arguments.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            raise JobError(f"task_args.{key}", value, f"{item.name} has no such argument",
                           f"Did you mean {near[0]}?" if near else f"It takes: {', '.join(names) or 'none'}")


def find_source(module: str) -> Path | None:
    """The file that `module` would be imported from, without importing any package on the way."""
    head, *rest = module.split(".")
    with working_directory_first():
        try:
            spec = importlib.util.find_spec(head)
        except (ImportError, ValueError):
            return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in folders:
        base = Path(folder, *rest)
        for candidate in (base.with_suffix(".py"), base / "__init__.py", *base.parent.glob(base.name + ".*.so")):
            if candidate.is_file():
                return candidate
    return None


@contextmanager
def working_directory_first() -> Iterator[None]:
    """Make user code importable from the working directory, as `python script.py` users expect."""
    added = os.getcwd()
    if added in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, added)
    try:
        yield
    finally:
        sys.path.remove(added)
