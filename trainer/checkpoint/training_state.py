"""Everything that a training would have to remember, saved and restored: the contents of a checkpoint."""

import dataclasses
import math
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from trainer.checkpoint import files as checkpoint
from trainer.checkpoint.exchange import read_once
from trainer.checkpoint.keeper import Keeper
from trainer.checkpoint.memory import MOMENTS
from trainer.checkpoint.newest import newest_together
from trainer.checkpoint.shard_keeper import ShardKeeper
from trainer.checkpoint.tracked import MODEL, TrackedObjects, entries_of
from trainer.checkpoint.weights import start_from
from trainer.checkpoint.writer import LOOK_S, Order
from trainer.config.job import Job
from trainer.config.load import read_sections
from trainer.data.sampler import Position
from trainer.errors import JobError, hide
from trainer.parallel.base import Parallel
from trainer.parallel.shards import part_of
from trainer.reporting.rank_report import Report
from trainer.run.folder import step_of


@dataclass(frozen=True)
class Found:
    """A state to go on from."""

    origin: str
    """The folder's name, or where else it was."""
    weights: dict[str, Any]
    state: dict[str, Any]


class TrainingState:
    """The objects that training changes, and where they stand on disk."""

    def __init__(
        self, job: Job, parallel: Parallel, report: Report,
        explain: Callable[[str, str, Exception], JobError] | None = None,
    ) -> None:  # fmt: skip
        """Nothing is tracked yet. `explain`: see `TrackedObjects`."""
        self.job, self.position, self.parallel, self.report = job, Position(), parallel, report
        self.root = report.run.checkpoints
        self.tracked = TrackedObjects(explain or self._explain)
        self.tracked.spread = parallel.spread
        kind = Keeper if parallel.shard is None else ShardKeeper
        self.keeper = kind(job, parallel, report.run, report.attempt, self.differs, report.notice)
        self.beat = partial(report.phase, "saving", self.position)
        self.begin_beat = partial(report.phase, "starting", self.position)
        self.metrics: dict[str, float] = {}
        """Of the last evaluation."""
        self.measured_at = -1
        """The step that `metrics` were measured after."""
        self.best: tuple[float, str] | None = None
        """Value of the best metric so far, and the name of its checkpoint."""
        self.evaluated = True
        """Whether what was due at the current position has been done."""
        self.owed = False
        """Whether what the training goes on from may be in memory alone, where nothing was saved since."""
        self.facts: Callable[[], dict[str, Any]] = dict
        """What else a checkpoint says of its run, and what the one that was restored said."""
        self.restored: dict[str, Any] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The job as it was given: interpolations stay as written, so it holds no secret."""
        return read_sections(self.report.run.job) if self.report.run.job.exists() else {}

    def differs(self) -> bool:
        """Whether what this rank holds is not what all hold, and that of rank 0 counts."""
        return not self.parallel.has_whole_state or self.tracked.has_buffers()

    def track(self, **objects: Any) -> None:
        """Keep these objects from here on; None is none."""
        for name, item in objects.items():
            if item is not None:
                self.tracked.add(name, item)

    def save(self, wait: bool = False) -> None:
        """Save the current position: rank 0 writes. With `wait` all ranks go on when it is committed.

        Raises Exception: it, or the one before, could not be committed; on all ranks.
        """
        self._choose_best()
        contents = self.contents() if self.parallel.cuts_model else None
        submit = partial(self._submit, wait, contents)
        if self.parallel.shard is not None:
            self._save_shards(submit, wait)
        else:
            self._agree(partial(self.keeper.insist, submit, self.beat) if wait else submit)
        self.owed = False

    def settle(self, end: float = math.inf) -> bool:
        """Return when nothing is being written any more: whether the newest save was committed.

        If it was not, it is worth another try. Raises Exception: it is not, or it is later than `end`; on all ranks.
        """
        failed = False

        def look() -> None:
            nonlocal failed
            try:
                self.keeper.wait(self.beat)
            except OSError as error:
                if not self.keeper.may_fail(error) or time.monotonic() > end:
                    raise
                failed = True

        self._agree(look)
        return not self.parallel.any(failed, self.beat)

    def _agree(self, action: Callable[[], None]) -> None:
        """Let rank 0, or all that have shards, do something; what goes wrong is raised on all ranks."""
        started = time.perf_counter()
        self.beat()
        problem: BaseException | None = None
        if self.parallel.rank == 0 or self.parallel.shard is not None:
            try:
                action()
            except Exception as error:
                problem = error
        if self.parallel.any(problem is not None, self.beat):
            every = self.parallel.gather(problem and f"{type(problem).__name__}: {problem}")
            rank, said = next((rank, said) for rank, said in enumerate(every) if said)
            raise problem or RuntimeError(f"rank {rank} could not save: {said}")
        self.report.pause(time.perf_counter() - started)

    def _save_shards(self, submit: Callable[[], None], wait: bool) -> None:
        """All ranks save together, and again if a disk failed one of them for a moment: see `Keeper.insist`."""
        end = time.monotonic() + self.keeper.limit_s
        while True:
            self._agree(partial(self.keeper.prepare, self._moment(), self.contents, self.beat))
            self._agree(submit)
            if not wait or self.settle(end):
                return
            time.sleep(LOOK_S)

    def close(self) -> None:
        """Finish what is being written; for an end that has a cause of its own."""
        try:
            self.keeper.close(self.beat)
        except Exception as error:
            self.report.warn(f"the last checkpoint was not saved: {error}", "checkpoint_failed", problem=str(error))

    def _submit(self, urgent: bool, contents: dict[str, Any] | None) -> None:
        position, job = self.position, self.job
        facts_of_run = {
            "job": hide(job.name), "epoch": position.epoch, "samples": position.samples, "seed": job.seed,
            "world_size": self.parallel.world_size, "parallel": job.parallel, "metrics": self.metrics,
            "config": self.config,
        }  # fmt: skip
        run, best = str(self.report.run), self.best[1] if self.best else None
        order = Order(run, position.step, self.report.attempt, facts_of_run, job.checkpoint.keep_last, best, urgent)
        contents = contents or (self.contents() if self.parallel.shard is None else {})  # shards are prepared
        self.keeper.save(order, self._moment(), contents, self.beat)

    def boundary(self) -> None:
        """A step is done, with all that was due after it, and ranks are alike: copy the state if it is time to."""
        self.keeper.boundary(self._moment(), self.contents)

    def _moment(self) -> int:
        """See `Seal`. Of a session, an epoch ends some time after its last step."""
        return MOMENTS * self.position.step + 2 * (self.position.samples == 0) + self.evaluated

    def contents(self) -> dict[str, Any]:
        """What a training goes on from."""
        weights, objects = self.tracked.dump()
        self.parallel.whole_state(weights, objects)
        return {
            "model": weights, "objects": objects, "position": dataclasses.asdict(self.position),
            "evaluated": self.evaluated, "metrics": self.metrics, "best": self.best, "facts": self.facts(),
            "measured_at": self.measured_at, "shard": self.parallel.shard,
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

    def resume(self) -> None:
        """Go on from the newest state that there is, with all that is tracked; or start: from weights, or anew."""
        found = self.find()
        if found is not None:
            self.restore(found)
        elif self.job.checkpoint.load:
            self.load_weights()

    def load_weights(self) -> None:
        """Start with the weights that the job names."""
        objects, options = self.tracked.objects, self.job.checkpoint
        load: Callable[[Callable[[], Any]], Any] = partial(read_once, self.parallel, beat=self.begin_beat)
        path, model = Path(str(options.load)), objects[MODEL]
        sharded = isinstance(model, nn.Module) and all(part_of(weight) for weight in model.parameters())
        shard = self.parallel.shard if sharded else None
        start_from(model, path, options.strict, self.report.say, load, partial(self.parallel.spread, model), shard)
        if "average" in objects:
            objects["average"].module.load_state_dict(objects[MODEL].state_dict())

    def find(self) -> Found | None:
        """The newest state to go on from: in the memory of the nodes, or a whole checkpoint; None: neither."""
        first, beat = self.parallel.rank == 0, self.begin_beat
        kept = self.keeper.recover(self.report.run.steps_committed() if first else -1, beat)
        self.owed = kept is not None
        if kept is not None:
            if first and not self.job.checkpoint.asynchronous:  # else whoever writes does it
                checkpoint.sweep(self.root)
            self.report.event("resume", step=kept["position"]["step"], folder="memory")
            return Found("the copy in memory", kept["model"], kept)
        if self.parallel.shard is not None:
            tidy = partial(self._tidy_up, beat)
            found = newest_together(self.parallel, self.root, self.parallel.shard, tidy, self._refuse, beat)
            if found is not None:
                self.report.event("resume", step=step_of(self.root / found[0]), folder=found[0])
            return Found(found[0], *found[1]) if found else None
        name, payload = read_once(self.parallel, lambda: self._read_newest(beat), beat)
        return Found(name, *payload) if name else None

    def restore_object(self, found: Found, name: str) -> None:
        """Bring one object where it was, if the state has it. Raises JobError: it is something else now."""
        entry = entries_of(found.state).get(name)
        if entry is not None:
            self.tracked.restore(name, found.weights, entry, found.origin)

    def untracked(self, found: Found | None) -> list[str]:
        """Names in a state that nothing is tracked by."""
        return [] if found is None else [name for name in entries_of(found.state) if name not in self.tracked.objects]

    def restore(self, found: Found) -> None:
        """Bring everything where it was. Raises JobError: the job trains something else now."""
        self.restore_position(found)
        for name in self.tracked.objects:
            self.restore_object(found, name)

    def restore_position(self, found: Found) -> None:
        """All but the tracked objects."""
        state = found.state
        for item in dataclasses.fields(Position):
            setattr(self.position, item.name, state["position"][item.name])
        self.evaluated, self.metrics = state["evaluated"], state["metrics"]
        self.measured_at = state.get("measured_at", -1)
        self.restored = state.get("facts", {})
        self.best = tuple(state["best"]) if state["best"] else None

    def _tidy_up(self, beat: Callable[[], None]) -> None:
        self.keeper.await_others(beat)
        checkpoint.sweep(self.root)

    def _refuse(self, folder: Path, problem: str) -> None:
        """A damaged checkpoint loses its name, or it would count as kept."""
        self.report.warn(f"checkpoint refused: {problem}", "checkpoint_refused", problem=problem)
        folder.rename(self.root / f"damaged-{folder.name}-{time.time_ns()}")

    def _read_newest(self, beat: Callable[[], None]) -> tuple[str, list[Any]]:
        """The name and the contents of the newest checkpoint, if there is one; damaged ones before it lose theirs."""
        self._tidy_up(beat)
        payload: list[Any] = []
        saved, refused = checkpoint.newest_good(self.root, lambda folder: payload.extend(checkpoint.read(folder, beat)))
        for folder, problem in refused.items():
            self._refuse(folder, problem)
        if saved is None:
            return "", []
        self.report.event("resume", step=step_of(saved), folder=saved.name)
        return saved.name, payload

    def _explain(self, name: str, origin: str, error: Exception) -> JobError:
        """The error for what a task made, and a checkpoint does not fit."""
        text = " ".join(str(error).split())
        if name == "optimizer":
            remedy = "Resume with the optimizer that the run began with"
            return JobError("train.optimizer", self.job.train.optimizer, f"does not fit {origin}: {text}", remedy)
        problem = f"its {name} does not fit the checkpoint: {text}"
        return JobError("task", self.job.task, problem, "Use the task and task_args of that checkpoint")
