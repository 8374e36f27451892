"""Loading a job beside the import of torch, in a process of its own: OmegaConf alone takes a tenth of a second."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from pathlib import Path
from typing import NamedTuple, NoReturn

from trainer.config.job import Job
from trainer.signals import end_with


class Loaded(NamedTuple):
    """A job as an agent needs it."""

    job: Job
    text: str
    """Of job.yaml."""
    says_nodes: bool
    """Whether the file or the command line says how many nodes."""


def load(path: Path, overrides: list[str]) -> Loaded:
    """Load here and now.

    Raises:
        JobError: see `trainer.config.load.load_job`.
    """
    from trainer.config.load import merge_job, read_sections, to_job, to_text

    config = merge_job(path, overrides)
    says_nodes = "nodes" in read_sections(path) or any(word.startswith("nodes=") for word in overrides)
    return Loaded(to_job(config), to_text(config), says_nodes)


class Loading:
    """A job that is being loaded, unless it was `loaded` before."""

    def __init__(self, path: Path, overrides: list[str], loaded: Loaded | None) -> None:
        """Begin; this process must have one thread."""
        self.path, self.overrides, self.loaded = path, overrides, loaded
        if loaded is not None:
            return
        self.answer, end = os.pipe()
        parent = os.getpid()
        self.process = os.fork()
        if not self.process:
            end_with(parent, signal.SIGKILL)
            self._load(end)
        os.close(end)

    def _load(self, end: int) -> NoReturn:
        """In the other process: answer nothing when it fails."""
        with contextlib.suppress(BaseException), os.fdopen(end, "wb") as pipe:
            pipe.write(pickle.dumps(load(self.path, self.overrides)))
        os._exit(0)

    def result(self) -> Loaded:
        """Wait for it.

        Raises:
            JobError: see `load`.
        """
        if self.loaded is not None:
            return self.loaded
        with os.fdopen(self.answer, "rb") as pipe:
            data = pipe.read()
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
            os.waitpid(self.process, 0)
        if not data:
            return load(self.path, self.overrides)
        loaded: Loaded = pickle.loads(data)
        return loaded
