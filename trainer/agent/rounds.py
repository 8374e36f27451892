"""What the agents of a job tell each other in a round. How they reach each other is up to `trainer.agent.rendezvous`.

In a round each agent reports what failed, if anything did; then node 0 plans: all agents start ranks, or the job ends.
Whoever wants the next round ends the current one. docs/faults.md explains launch, round, attempt and restart.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.agent.failure import KINDS, Failure
from trainer.errors import FAILED, WRONG_JOB
from trainer.version import __version__

CHARS = 4000
"""Of each text that is told: what more it says is in the logs."""


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


class RanksStopped(Ended):
    """The ranks here stopped because somebody asked for it, here or on another node."""


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


def make_end(reason: str, code: int) -> list[Any]:
    """What an agent tells the others of the end of the job."""
    return [reason[:CHARS], code]


def read_end(told: Any) -> Ended:
    """The end that an agent told of."""
    match told:
        case [str(reason), int(code)] if 0 < code < 256:
            return Ended(reason, code)
    return Ended(f"an agent ended the job, with a reason that cannot be read: {str(told)[:100]}", FAILED)


def make_report(versions: dict[str, str], failure: Failure | None) -> dict[str, Any]:
    """What an agent tells node 0 when ranks have ended: in a size that can be sent."""
    facts = asdict(failure) if failure else {}
    short = {key: value[:CHARS] if isinstance(value, str) else value for key, value in facts.items()}
    return {"versions": versions, "failure": short or None}


def check_versions(versions: Sequence[Any]) -> None:
    """Refuse nodes whose packages differ from those of node 0. Raises Ended: some do."""
    for node, told in enumerate(versions):
        theirs = told if isinstance(told, dict) else {}
        for package, ours in versions[0].items():
            if theirs.get(package) != ours:
                what = f"node {node} has {package} {theirs.get(package)}, and node 0 {ours}"
                raise Ended(f"{what}: use one environment", WRONG_JOB)


def read_failures(reports: Sequence[Any]) -> list[Failure]:
    """The failures that agents of this version report. Raises Ended: one of them makes no sense."""
    failures = []
    for node, report in enumerate(reports):
        if told := report.get("failure"):
            try:
                failures.append(Failure(**told))
            except TypeError:
                raise Ended(f"node {node} reports what cannot be read: {str(told)[:200]}", FAILED) from None
            if not _is_sound(failures[-1], len(reports)):
                raise Ended(f"node {node} reports what makes no sense: {str(told)[:200]}", FAILED)
    return failures


def _is_sound(failure: Failure, nodes: int) -> bool:
    """Whether each field is of its type, and what others look up by it is there."""
    types = {field.name: (int, float) if field.type is float else field.type for field in fields(failure)}
    sound = all(isinstance(getattr(failure, name), kind) for name, kind in types.items())  # type: ignore[arg-type]
    return sound and 0 <= failure.node < nodes and failure.kind in KINDS
