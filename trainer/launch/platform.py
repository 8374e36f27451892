"""What a platform must be able to do, and the registry: a new platform is one module, one template folder, one line."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.job import Job
from trainer.errors import JobError

if TYPE_CHECKING:  # not for the verbs that only read
    from omegaconf import DictConfig

REGISTRY = {
    "local": "trainer.launch.local.platform:Local",
    "docker": "trainer.launch.docker.platform:Docker",
    "slurm": "trainer.launch.slurm.platform:Slurm",
    "kubernetes": "trainer.launch.kubernetes.platform:Kubernetes",
}


@dataclass(frozen=True)
class Plan:
    """One job, ready to be rendered or submitted."""

    job: Job
    config: DictConfig
    run: Path
    """The run folder; for a rendering, where it would be."""
    site: dict[str, Any] = field(default_factory=dict)
    site_file: Path | None = None
    """Where `site` was read; None: the platform's own file."""


@dataclass(frozen=True)
class State:
    """What the platform says about a submission."""

    word: str
    """pending, running, stopped, done, failed, cancelled or lost."""
    reason: str = ""
    code: int | None = None


class Platform(ABC):
    """One way to run a job."""

    name: str
    arrays = False
    """Whether it has `submit_sweep`."""

    def load_site(self, path: Path | None) -> dict[str, Any]:
        """Read the site file; platforms without one accept none.

        Raises:
            JobError: unknown key or wrong value.
        """
        if path is not None:
            raise JobError("--site", str(path), f"{self.name} has no site file", "Remove it")
        return {}

    @abstractmethod
    def render(self, plan: Plan) -> str:
        """Exactly what `submit` would hand to the platform's own tool."""

    @abstractmethod
    def submit(self, plan: Plan, follow: bool) -> dict[str, Any]:
        """Submit and return the handle that is kept in `handle.json`; `follow`: the caller waits for the end."""

    def submit_sweep(self, plan: Plan, runs: list[Path]) -> list[dict[str, Any]]:
        """Submit several runs as one array; `plan.run` is the folder whose `sweep.json` names them."""
        raise NotImplementedError

    def nodes(self, run: Path, job: Job) -> Any:
        """What a supervisor on this machine starts agents on, for platforms that have one."""
        raise NotImplementedError

    @abstractmethod
    def state(self, run: Path, handle: dict[str, Any]) -> State:
        """Where the submission stands."""

    @abstractmethod
    def cancel(self, run: Path, handle: dict[str, Any]) -> None:
        """Stop it, with a checkpoint, for good."""

    @abstractmethod
    def preempt(self, run: Path, handle: dict[str, Any]) -> None:
        """Stop it as the platform's preemption would, and let it come back."""


def find_platform(name: str) -> Platform:
    """The platform of that name.

    Raises:
        JobError: there is none.
    """
    if name not in REGISTRY:
        raise JobError("--on", name, "is none of " + ", ".join(REGISTRY), "Choose one of them")
    module, _, symbol = REGISTRY[name].partition(":")
    platform = getattr(importlib.import_module(module), symbol)()
    assert isinstance(platform, Platform)
    return platform
