"""The trace of the steps that a job names, for chrome://tracing or Perfetto."""

from collections.abc import Sequence
from pathlib import Path

import torch


class Profile:
    """Traces steps `first` to `last`, of which the first of a run is 1."""

    def __init__(self, steps: Sequence[int], path: Path) -> None:
        """`steps`: (first, last), or none to trace nothing. `path`: the file to write."""
        self.first, self.last = steps or (1, 0)
        self.path = path
        self.profiler: torch.profiler.profile | None = None

    def step(self, done: int) -> None:
        """So many steps are done: begin or end the trace here, if it begins or ends here."""
        if self.profiler is None and self.first <= done + 1 <= self.last:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler is not None and done >= self.last:
            self.close()

    def close(self) -> None:
        """Write the trace, if one was begun. A run may end before the last step to trace."""
        if self.profiler is not None:
            self.profiler.stop()
            self.path.parent.mkdir(exist_ok=True)
            self.profiler.export_chrome_trace(str(self.path))
            self.profiler = None
