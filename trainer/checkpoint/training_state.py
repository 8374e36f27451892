"""Everything that a training would have to remember, saved and restored: the contents of a checkpoint."""

import dataclasses
import math
import operator
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import files as checkpoint
from trainer.checkpoint.background_writer import Writer
from trainer.checkpoint.handover import Handover
from trainer.checkpoint.weights import fit, start_from
from trainer.config.job import Job
from trainer.config.load import read_sections
from trainer.data.sampler import Position
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.module_state import buffers_beside, changed_numbers, numbers, restore_buffers, restore_numbers
from trainer.reporting.rank_report import Report


class TrainingState:
    """The objects that training changes, and where they stand on disk."""

    def __init__(
        self, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None,
        average: Any, parallel: Parallel, report: Report,
    ) -> None:  # fmt: skip
        """`average`: has the averaged weights in `module` and the number of updates in `n_averaged`; or None."""
        self.job, self.model, self.optimizer, self.scaler = job, model, optimizer, scaler
        self.average, self.position, self.parallel, self.report = average, Position(), parallel, report
        self.root = report.run.checkpoints
        self.config = read_sections(report.run.job) if report.run.job.exists() else {}
        """As it was given: interpolations stay as written, so it holds no secret."""
        self.writer = Writer(job.checkpoint.asynchronous)
        self.handover = Handover(job, parallel, model, report.attempt, self.contents)
        self.beat = partial(report.phase, "saving", self.position)
        self.metrics: dict[str, float] = {}
        """Of the last evaluation."""
        self.measured_at = -1
        """The step that `metrics` were measured after, in this attempt."""
        self.best: tuple[float, str] | None = None
        """Value of the best metric so far, and the name of its checkpoint."""
        self.evaluated = True
        """Whether what was due at the current position has been done."""
        self.numbers = numbers(model)
        """What the parts of the model counted when it was new: a checkpoint holds what is another since."""
        self.facts: Callable[[], dict[str, Any]] = dict
        """What else a checkpoint says of its run, and what the one that was restored said."""
        self.restored: dict[str, Any] = {}

    def save(self, wait: bool = False) -> None:
        """Save the current position: rank 0 writes. With `wait` all ranks go on when it is committed.

        Raises Exception: it, or the one before, could not be committed; on all ranks.
        """
        started = time.perf_counter()
        self.beat()
        self._choose_best()
        problem: BaseException | None = None
        if self.parallel.rank == 0:
            try:
                self._submit()
                if wait:
                    self.writer.wait(self.beat)
            except Exception as error:
                problem = error
        if self.parallel.any(problem is not None):
            raise problem or RuntimeError("rank 0 could not save; its log says why")
        self.report.pause(time.perf_counter() - started)

    def close(self) -> None:
        """Finish what is being written; for an end that has a cause of its own."""
        try:
            self.writer.wait(self.beat)
        except Exception as error:
            self.report.warn(f"the last checkpoint was not saved: {error}", "checkpoint_failed", problem=str(error))

    def _submit(self) -> None:
        position = self.position
        facts_of_run = {
            "job": self.job.name, "epoch": position.epoch, "samples": position.samples, "seed": self.job.seed,
            "world_size": self.parallel.world_size, "parallel": self.job.parallel, "metrics": self.metrics,
            "config": self.config,
        }  # fmt: skip
        contents = self.contents()
        payload = {"model.pt": contents.pop("model"), "state.pt": contents}
        self.writer.submit(payload, partial(self._commit, position.step, facts_of_run, self.best), self.beat)

    def contents(self) -> dict[str, Any]:
        """What a training goes on from."""
        scaler, average = self.scaler, self.average
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "buffers": buffers_beside(self.model), "numbers": changed_numbers(self.model, self.numbers),
            "scaler": scaler.state_dict() if scaler else None,
            "average": {"model": average.module.state_dict(), "updates": average.n_averaged} if average else None,
            "position": dataclasses.asdict(self.position), "evaluated": self.evaluated, "metrics": self.metrics,
            "best": self.best, "facts": self.facts(),
        }  # fmt: skip

    def _choose_best(self) -> None:
        """Note whether the current position has the best metric so far; all ranks decide alike."""
        name, best, step = self.job.checkpoint.best, self.best, self.position.step
        if not name or not self.metrics:
            return
        if name not in self.metrics:
            remedy = f"The metrics are {', '.join(self.metrics)}"
            raise JobError("checkpoint.best", name, "is not a metric of this task", remedy)
        better = operator.gt if self.job.checkpoint.best_mode == "max" else operator.lt
        value = self.metrics[name]
        if self.measured_at == step and not math.isnan(value) and (best is None or better(value, best[0])):
            self.best = value, f"step-{step:09d}"

    def _commit(self, step: int, facts: dict[str, Any], best: tuple[float, str] | None, payload: Any) -> None:
        folder = checkpoint.commit(self.root, step, payload, facts, self.report.attempt)
        self.report.event("checkpoint", step=step, folder=str(folder.relative_to(self.report.run.path)))
        checkpoint.prune(self.root, self.job.checkpoint.keep_last, best[1] if best else None)

    def resume(self) -> None:
        """Continue from what survivors handed over or the newest whole checkpoint, or start: from weights, or anew."""
        kept = self.handover.take_over(self.report.run.steps_committed())
        if kept is not None:
            self._restore(kept, kept["model"], "the survivors' memory")
            if self.parallel.rank == 0:
                checkpoint.sweep(self.root)
            self.report.event("resume", step=self.position.step, folder="memory")
            return
        found = self.parallel.share(self._find() if self.parallel.rank == 0 else None)
        if isinstance(found, Exception):
            raise found
        if found is not None:
            self._load(Path(found))
        elif self.job.checkpoint.load:
            start_from(self.model, Path(self.job.checkpoint.load), self.job.checkpoint.strict, self.report.say)
            if self.average is not None:
                self.average.module.load_state_dict(self.model.state_dict())

    def _find(self) -> str | Exception | None:
        try:
            checkpoint.sweep(self.root)
            saved, refused = checkpoint.newest_good(self.root)
        except checkpoint.DamagedCheckpoint as error:
            return error
        for folder, problem in refused.items():
            self.report.warn(f"checkpoint refused: {problem}", "checkpoint_refused", problem=problem)
            folder.rename(self.root / f"damaged-{folder.name}-{time.time_ns()}")  # or it would count as kept
        if saved is None:
            return None
        self.report.event("resume", step=checkpoint.step_of(saved), folder=saved.name)
        return str(saved)

    def _load(self, folder: Path) -> None:
        """Restore from a folder; rank 0 reads where some node does not see it: no shared volume, or one that lags."""
        seen = not self.parallel.any(not (folder / "manifest.json").is_file())
        payload = None
        if seen or self.parallel.rank == 0:
            payload = [checkpoint.load(folder, name) for name in checkpoint.PAYLOAD]
        weights, state = payload if payload and seen else self.parallel.share(payload)
        self._restore(state, weights, folder.name)

    def _restore(self, state: dict[str, Any], weights: dict[str, Any], origin: str) -> None:
        beside = state.get("buffers", {"saved": [], "others": {}})  # older checkpoints say nothing of them
        restore_buffers(self.model, weights, beside)
        restore_numbers(self.model, state.get("numbers", {}))
        self._load_weights(weights)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            problem = f"does not fit {origin}: {error}"
            remedy = "Resume with the optimizer that the run began with"
            raise JobError("train.optimizer", self.job.train.optimizer, problem, remedy) from None
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"]:
            restore_buffers(self.average.module, state["average"]["model"], beside)
            self.average.module.load_state_dict(state["average"]["model"])
            self.average.n_averaged.copy_(state["average"]["updates"])
        for item in dataclasses.fields(Position):
            setattr(self.position, item.name, state["position"][item.name])
        self.evaluated, self.metrics = state["evaluated"], state["metrics"]
        self.restored = state.get("facts", {})
        self.best = tuple(state["best"]) if state["best"] else None

    def _load_weights(self, weights: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            fitting, misfits = fit(weights, self.model)  # a wrapper, such as a compiled model's, may have come or gone
            if misfits:
                problem = "its model does not fit the checkpoint: " + " ".join(str(error).split())
                remedy = "Use the task and task_args of that checkpoint"
                raise JobError("task", self.job.task, problem, remedy) from None
            self.model.load_state_dict(fitting, strict=False)
