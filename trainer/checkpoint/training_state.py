"""Everything that a training would have to remember, saved and restored: the contents of a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from trainer.checkpoint import files as checkpoint
from trainer.checkpoint.background_writer import Writer
from trainer.checkpoint.handover import Handover
from trainer.config.job import Job
from trainer.config.load import read_sections
from trainer.data.sampler import Position
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.reporting.rank_report import Report


class TrainingState:
    """The objects that training changes, and where they stand on disk."""

    def __init__(
        self, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None,
        average: AveragedModel | None, position: Position, parallel: Parallel, report: Report,
    ) -> None:  # fmt: skip
        """Remember the objects; `report` knows the run folder and the attempt."""
        self.job, self.model, self.optimizer, self.scaler = job, model, optimizer, scaler
        self.average, self.position, self.parallel, self.report = average, position, parallel, report
        self.root = report.run.checkpoints
        self.config = read_sections(report.run.job) if report.run.job.exists() else {}
        """As it was given: interpolations stay as written, so it holds no secret."""
        self.writer = Writer(job.checkpoint.asynchronous)
        self.handover = Handover(job, parallel, model, report.attempt)
        self.metrics: dict[str, float] = {}
        """Of the last evaluation."""
        self.measured_at = -1
        """The step that `metrics` were measured after, in this attempt."""
        self.best: tuple[float, str] | None = None
        """Value of the best metric so far, and the name of its checkpoint."""
        self.evaluated = True
        """Whether what was due at the current position has been done."""

    def measure(self, metrics: dict[str, float]) -> None:
        """Take note of an evaluation at the current position."""
        self.metrics, self.measured_at = metrics, self.position.step

    def save(self, wait: bool = False) -> None:
        """Save the current position: rank 0 writes. With `wait` all ranks go on when it is committed.

        Raises:
            Exception: it, or the one before, could not be committed; on all ranks.
        """
        started = time.perf_counter()
        position = self.position
        self.report.phase("saving", position)
        self._choose_best()
        problem: BaseException | None = None
        if self.parallel.rank == 0:
            try:
                self._submit()
                if wait:
                    self.writer.wait(self._beat)
            except Exception as error:
                problem = error
        if self.parallel.any(problem is not None):
            raise problem or RuntimeError("rank 0 could not save; its log says why")
        self.report.pause(time.perf_counter() - started)

    def close(self) -> None:
        """Finish what is being written; for an end that has a cause of its own."""
        try:
            self.writer.wait(self._beat)
        except Exception as error:
            self.report.warn(f"the last checkpoint was not saved: {error}", "checkpoint_failed", problem=str(error))

    def _beat(self) -> None:
        self.report.phase("saving", self.position)

    def _submit(self) -> None:
        position = self.position
        facts_of_run = {
            "job": self.job.name, "epoch": position.epoch, "samples": position.samples, "seed": self.job.seed,
            "world_size": self.parallel.world_size, "parallel": self.job.parallel, "metrics": self.metrics,
            "config": self.config,
        }  # fmt: skip
        contents = self.contents()
        payload = {"model.pt": contents.pop("model"), "state.pt": contents}
        self.writer.submit(payload, partial(self._commit, position.step, facts_of_run, self.best), self._beat)

    def contents(self) -> dict[str, Any]:
        """What a training goes on from."""
        average = self.average
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "average": {"model": average.module.state_dict(), "updates": average.n_averaged} if average else None,
            "position": dataclasses.asdict(self.position),
            "evaluated": self.evaluated,
            "metrics": self.metrics,
            "best": self.best,
        }

    def _choose_best(self) -> None:
        """Note whether the current position has the best metric so far; all ranks decide alike."""
        facts, best = self.job.checkpoint, self.best
        if facts.best and self.metrics and facts.best not in self.metrics:
            raise JobError(
                "checkpoint.best",
                facts.best,
                "is not a metric of this task",
                f"The metrics are {', '.join(self.metrics)}",
            )
        value = self.metrics.get(facts.best or "", math.nan) if self.measured_at == self.position.step else math.nan
        if not math.isnan(value) and (
            best is None or (value > best[0] if facts.best_mode == "max" else value < best[0])
        ):
            self.best = value, f"step-{self.position.step:09d}"

    def _commit(self, step: int, facts: dict[str, Any], best: tuple[float, str] | None, payload: Any) -> None:
        saved = checkpoint.commit(self.root, step, payload, facts, self.report.attempt)
        self.report.event("checkpoint", step=step, folder=str(saved.folder.relative_to(self.report.run.path)))
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
            self._load_weights(checkpoint.load_weights(Path(self.job.checkpoint.load)))
            if self.average is not None:
                self.average.module.load_state_dict(self.model.state_dict())

    def _find(self) -> str | Exception | None:
        try:
            checkpoint.sweep(self.root)
            saved, refused = checkpoint.newest_good(self.root)
        except checkpoint.DamagedCheckpoint as error:
            return error
        for problem in refused:
            self.report.warn(f"checkpoint refused: {problem}", "checkpoint_refused", problem=problem)
        if saved is None:
            return None
        checkpoint.set_aside_newer(self.root, saved.step)
        self.report.event("resume", step=saved.step, folder=saved.folder.name)
        return str(saved.folder)

    def _read(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights and state; rank 0's where some node does not see the folder: no shared volume, or one that lags."""
        if not self.parallel.any(not (folder / "manifest.json").is_file()):
            return checkpoint.load(folder, "model.pt"), checkpoint.load(folder, "state.pt")
        first = self.parallel.rank == 0
        payload: tuple[dict[str, Any], dict[str, Any]] = self.parallel.share(
            (checkpoint.load(folder, "model.pt"), checkpoint.load(folder, "state.pt")) if first else None
        )
        return payload

    def _load(self, folder: Path) -> None:
        weights, state = self._read(folder)
        self._restore(state, checkpoint.unwrapped(weights), folder.name)

    def _restore(self, state: dict[str, Any], weights: dict[str, Any], origin: str) -> None:
        self._load_weights(weights)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise JobError(
                "train.optimizer",
                self.job.train.optimizer,
                f"does not fit {origin}: {error}",
                "Resume with the optimizer that the run began with",
            ) from None
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"]:
            self.average.module.load_state_dict(state["average"]["model"])
            self.average.n_averaged.copy_(state["average"]["updates"])
        for item in dataclasses.fields(Position):
            setattr(self.position, item.name, state["position"][item.name])
        self.evaluated, self.metrics = state["evaluated"], state["metrics"]
        self.best = tuple(state["best"]) if state["best"] else None

    def _load_weights(self, weights: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise JobError(
                "task",
                self.job.task,
                "its model does not fit the checkpoint: " + " ".join(str(error).split()),
                "Use the task and task_args of that checkpoint",
            ) from None
