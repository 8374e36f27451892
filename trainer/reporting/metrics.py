"""The numbers that rank 0 logs, and the sinks that they go to: `metrics.jsonl` and TensorBoard.

When something is logged is decided in `trainer.reporting.rank_report`. Another tracker is one more class here; a place
that cannot be written must not end a training, so it says so once, and tries again later.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.records import write_json
from trainer.run.folder import RunFolder
from trainer.run.line_file import KEPT, RETRY_S, LineFile, warn

Values = Mapping[str, float]
EVERY_S = 1.0
"""Between two times that TensorBoard is given what was logged."""


class Sink:
    """A place for metrics."""

    def write(self, step: int, kind: str, values: Values) -> None:
        """Write the values of one step; `kind` is train or evaluation."""

    def flush(self) -> None:
        """Write what is not written yet, so that a kill cannot lose it."""

    def close(self) -> None:
        """Flush; nothing follows."""


class JsonLines(Sink):
    """A file with one JSON object for each write; `attempt` is in each, because a restart repeats steps."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.file = LineFile(path)  # writes each line at once
        self.attempt = attempt

    def write(self, step: int, kind: str, values: Values) -> None:
        self.file.write({"kind": kind, "step": step, "attempt": self.attempt, "time": round(time.time(), 3), **values})

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class LastEvaluation(Sink):
    """A file with the last evaluation: among millions of steps nobody would find it."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path, self.attempt = path, attempt

    def write(self, step: int, kind: str, values: Values) -> None:
        if kind == "evaluation":
            try:
                write_json(self.path, {"step": step, "attempt": self.attempt, **values}, sync=False)
            except OSError as error:
                warn(f"{self.path} cannot be written: {error.strerror}. `muster status` shows an earlier evaluation")


class TensorBoard(Sink):
    """Event files, by torch's SummaryWriter. TensorBoard hides what a killed attempt wrote beyond step `done`.

    Its records are made once a second: each wakes a thread of TensorBoard's, which takes 0.3 ms of a busy rank.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self.summary, self.make_writer, self.folder = Summary, SummaryWriter, folder
        self.hide_from: int | None = done + 1
        self.writer: Any = None
        self.waiting: deque[tuple[int, float, str, Values]] = deque(maxlen=KEPT)
        self.since = 0.0
        self.failed_at: float | None = None

    def write(self, step: int, kind: str, values: Values) -> None:
        """Write each value under the name `<kind>/<name>`, all in one record: `add_scalar` makes one for each."""
        now = time.time()
        self.waiting.append((step, now, kind, values))
        if not self.since <= now < self.since + EVERY_S:
            self._attempt(self._make_records)
            self.since = now

    def _make_records(self) -> None:
        while self.waiting:
            step, when, kind, values = self.waiting[0]
            parts = [self.summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in values.items()]
            self.writer.file_writer.add_summary(self.summary(value=parts), step, when)
            self.waiting.popleft()

    def flush(self) -> None:
        self._attempt(self._make_records, lambda: self.writer.flush())

    def close(self) -> None:
        self._attempt(self._make_records, lambda: self.writer.close())

    def _attempt(self, *acts: Callable[[], object]) -> None:
        """Do something with a writer; one that failed stays broken, and another takes its place after a while."""
        if self.failed_at is not None and time.monotonic() - self.failed_at < RETRY_S:
            return
        try:
            if self.writer is None:
                self.writer = self.make_writer(str(self.folder), purge_step=self.hide_from, flush_secs=1)
                self.hide_from = None
            for act in acts:
                act()
        except OSError as error:
            if self.failed_at is None:
                warn(f"{self.folder} misses values from here on: {error.strerror}. `metrics.jsonl` has them all")
            self.writer, self.failed_at = None, time.monotonic()
        else:
            self.failed_at = None


def make_sinks(run: RunFolder, attempt: int, done: int, tensorboard: bool) -> list[Sink]:
    """The sinks of a run of which `done` steps are done. Importing TensorBoard takes 0.1 s."""
    sinks: list[Sink] = [JsonLines(run.metrics, attempt), LastEvaluation(run.evaluation, attempt)]
    return [*sinks, TensorBoard(run.tensorboard, done)] if tensorboard else sinks
