"""What the agents of a job tell each other in a round. How they reach each other is up to `trainer.agent.rendezvous`.

In a round each agent reports what failed, if anything did; then node 0 plans: all agents start ranks, or the job ends.
Whoever wants the next round ends the current one. docs/faults.md explains launch, round, attempt and restart.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from trainer import __version__
from trainer.errors import WRONG_JOB


def torch_version() -> str:
    """The version of torch, without importing it: from its package's metadata, or as its own source says."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:  # built from source, and found through PYTHONPATH
        spec = importlib.util.find_spec("torch")
        file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
        text = file.read_text() if file and file.is_file() else ""
        found = re.search(r"^__version__\b.*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
        return found[1] if found else "of unknown version"


VERSIONS = {"muster": __version__, "torch": torch_version()}
"""What must be the same on all nodes, or ranks compute different things."""


class Ended(RuntimeError):
    """The agents agreed that the job ends; the message is the reason, `code` the exit code."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


class RendezvousTimeoutError(RuntimeError):
    """A node did not come within its bound."""


@dataclass(frozen=True)
class Round:
    """A round in which ranks are started. Node 0 tells the others all but `master_addr`."""

    number: int  # 1 for the first of a launch, then 2, 3, ...
    attempt: int
    master_addr: str  # where this node reaches node 0
    master_port: int  # of the store where the ranks find each other; the agent of node 0 serves it


@dataclass(frozen=True)
class Wishes:
    """What other agents want while ranks run."""

    stop: bool = False  # somebody asked for it
    next_round: bool = False  # meet again: something failed, or a replaced agent has come
    hung: bool = False  # a rank seems to hang; maybe it waits for one that hangs here
    cause_known: bool = False  # an agent has found a failure that is not the consequence of another one


def check_versions(versions: Sequence[dict[str, str]]) -> None:
    """Refuse nodes whose packages differ from those of node 0. Raises Ended: some do."""
    for node, theirs in enumerate(versions):
        for package, version in theirs.items():
            ours = versions[0].get(package)
            if version != ours:
                raise Ended(f"node {node} has {package} {version}, and node 0 {ours}: use one environment", WRONG_JOB)
