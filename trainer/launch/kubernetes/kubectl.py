"""kubectl, through which all requests to a cluster go. The site file may name its context and namespace."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

from trainer.errors import JobError

KINDS = {"job": "jobs.batch", "jobset": "jobsets.jobset.x-k8s.io"}
"""The values of `kind` in the site file, and their names in the API."""
REMEDIES = {
    "no matches for kind|doesn't have a resource type": "The cluster lacks that API: install it (JobSet's controller, "
    "Kueue), or set kind: job in the site file",
    "exceeded quota": "Ask for less in the site file (cpu, memory, gpu), or for more quota",
    "forbidden|unauthorized|provide credentials": "Ask for that right in this namespace: kubectl auth can-i --list",
    "field is immutable|being deleted|already exists": "An earlier submission of that name is still there: delete it "
    "with kubectl, or submit under another name",
    "connection|refused|no such host|time-?out|timed out|configuration|does not exist|current server": "Check "
    "`kubectl cluster-info`, and context and namespace in the site file",
}
"""Remedies by patterns in kubectl's message."""


class Refused(RuntimeError):
    """kubectl failed; the message is its own."""


class Kubectl:
    """kubectl with one context and namespace."""

    def __init__(self, context: str | None, namespace: str | None) -> None:
        """None: the current one of kubectl's configuration."""
        self.options = [f"--context={context}"] if context else []
        self.options += [f"--namespace={namespace}"] if namespace else []

    def command(self, *argv: str) -> list[str]:
        """The command line."""
        return ["kubectl", *self.options, *argv]

    def run(self, *argv: str, text: str | None = None, timeout_s: float = 120) -> str:
        """Run it, with `text` on its standard input, and return its output.

        Raises:
            JobError: there is no kubectl, or it does not answer.
            Refused: it failed.
        """
        try:
            done = subprocess.run(
                self.command(*argv), input=text, capture_output=True, text=True, timeout=timeout_s,
                stdin=subprocess.DEVNULL if text is None else None,
            )  # fmt: skip
        except FileNotFoundError:
            remedy = "Install kubectl, or apply what `muster render` prints on a machine that has it"
            raise JobError("--on", "kubernetes", "there is no kubectl on this machine", remedy) from None
        except subprocess.TimeoutExpired:
            problem = f"gave no answer within {timeout_s:.0f} s"
            raise JobError("kubectl", " ".join(argv), problem, "Check `kubectl cluster-info`") from None
        if done.returncode:
            raise Refused(" ".join((done.stderr or done.stdout).split())[-2000:] or f"exit code {done.returncode}")
        return done.stdout

    def run_or_raise(self, *argv: str, text: str | None = None, timeout_s: float = 120) -> str:
        """Run it; a refusal is the user's error.

        Raises:
            JobError: it failed; with kubectl's message and a remedy.
        """
        try:
            return self.run(*argv, text=text, timeout_s=timeout_s)
        except Refused as error:
            raise JobError("kubectl", " ".join(argv), f"refused: {error}", remedy_for(str(error))) from None

    def get(self, *argv: str) -> list[dict[str, Any]]:
        """The objects that `kubectl get ARGV` finds.

        Raises:
            Refused: it failed.
        """
        answer = json.loads(self.run("get", *argv, "--output=json", timeout_s=30))
        items = answer["items"] if answer["kind"].endswith("List") else [answer]
        assert isinstance(items, list)
        return items


def remedy_for(problem: str) -> str:
    """What to do about a message of kubectl."""
    for pattern, text in REMEDIES.items():
        if re.search(pattern, problem, re.IGNORECASE):
            return text
    return "`muster render` shows what was sent, and `kubectl explain` what is allowed"
