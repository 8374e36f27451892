"""The numbers that rank 0 logs, and the sinks that they go to: `metrics.jsonl` and TensorBoard.

When something is logged is decided in `trainer.reporting.rank_report`. Another tracker is one more class here.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.run.folder import RunFolder

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
        self.file = path.open("a", buffering=1)  # writes each line at once
        self.attempt = attempt

    def write(self, step: int, kind: str, values: Values) -> None:
        line = {"kind": kind, "step": step, "attempt": self.attempt, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard(Sink):
    """Event files, by torch's SummaryWriter. TensorBoard hides what a killed attempt wrote beyond step `done`.

    Its records are made once a second: each wakes a thread of TensorBoard's, which takes 0.3 ms of a busy rank.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self.summary = Summary
        self.writer: Any = SummaryWriter(str(folder), purge_step=done + 1, flush_secs=1)
        self.waiting: list[tuple[int, float, str, Values]] = []
        self.since = 0.0

    def write(self, step: int, kind: str, values: Values) -> None:
        """Write each value under the name `<kind>/<name>`, all in one record: `add_scalar` makes one for each."""
        now = time.time()
        self.waiting.append((step, now, kind, values))
        if not self.since <= now < self.since + EVERY_S:
            self._make_records()
            self.since = now

    def _make_records(self) -> None:
        for step, when, kind, values in self.waiting:
            parts = [self.summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in values.items()]
            self.writer.file_writer.add_summary(self.summary(value=parts), step, when)
        self.waiting.clear()

    def flush(self) -> None:
        self._make_records()
        self.writer.flush()

    def close(self) -> None:
        self._make_records()
        self.writer.close()


def make_sinks(run: RunFolder, attempt: int, done: int, tensorboard: bool) -> list[Sink]:
    """The sinks of a run of which `done` steps are done. Importing TensorBoard takes 0.1 s."""
    sinks: list[Sink] = [JsonLines(run.metrics, attempt)]
    return [*sinks, TensorBoard(run.tensorboard, done)] if tensorboard else sinks
