"""The numbers that rank 0 logs, and the sinks that they go to: `metrics.jsonl` and TensorBoard.

When something is logged is decided in `trainer.reporting.rank_report`. Another tracker is one more class here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from trainer.run.folder import RunFolder

Values = Mapping[str, float]
FLUSH_S = 1
"""How long TensorBoard's values may be in memory only."""


class Sink(Protocol):
    """A place for metrics."""

    def write(self, step: int, kind: str, values: Values) -> None:
        """Write the values of one step; `kind` is train or evaluation."""

    def flush(self) -> None:
        """Write what is not written yet, so that a kill cannot lose it."""

    def close(self) -> None:
        """Flush; nothing follows."""


class JsonLines:
    """A file with one JSON object for each write."""

    def __init__(self, path: Path, attempt: int) -> None:
        """`attempt`: noted in each line, because a restart repeats steps."""
        self.file = path.open("a", buffering=1)
        self.attempt = attempt

    def write(self, step: int, kind: str, values: Values) -> None:
        """Append a line."""
        line = {"kind": kind, "step": step, "attempt": self.attempt, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Each line is written at once."""

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """Event files, by torch's SummaryWriter."""

    def __init__(self, folder: Path, step: int) -> None:
        """`step`: steps done before. TensorBoard hides what a killed attempt wrote beyond it."""
        self.folder, self.step = folder, step
        self.writer: Any = None

    def write(self, step: int, kind: str, values: Values) -> None:
        """Write each value under the name `<kind>/<name>`: 0.3 ms for four, most of it in the writer's thread."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter  # 0.1 s, which the first step need not wait for

            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1, flush_secs=FLUSH_S)
        for name, value in values.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Wait for the writer's thread."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """End the writer's thread."""
        if self.writer is not None:
            self.writer.close()


def make_sinks(run: RunFolder, attempt: int, step: int, tensorboard: bool) -> list[Sink]:
    """The sinks of a run that goes on after `step` steps."""
    sinks: list[Sink] = [JsonLines(run.metrics, attempt)]
    return [*sinks, TensorBoard(run.tensorboard, step)] if tensorboard else sinks
