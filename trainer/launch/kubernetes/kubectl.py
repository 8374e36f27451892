"""kubectl: the one way to a cluster. Its own configuration says how; the site may name context and namespace."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

from trainer.errors import JobError

KINDS = {"job": "jobs.batch", "jobset": "jobsets.jobset.x-k8s.io"}
"""The site's word for what holds the pods, and the API's."""
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
"""What to do about kubectl's words, by patterns in them."""


class Refused(RuntimeError):
    """kubectl ended with an error; the message is its own."""


class Kubectl:
    """kubectl with one context and namespace."""

    def __init__(self, context: str | None, namespace: str | None) -> None:
        """None: what kubectl's configuration has as its current one."""
        self.options = [f"--context={context}"] if context else []
        self.options += [f"--namespace={namespace}"] if namespace else []

    def command(self, *words: str) -> list[str]:
        """The command line."""
        return ["kubectl", *self.options, *words]

    def run(self, *words: str, text: str | None = None, timeout_s: float = 120) -> str:
        """Run it, with `text` on its standard input, and return its output.

        Raises:
            JobError: there is no kubectl, or it does not answer.
            Refused: it failed.
        """
        try:
            done = subprocess.run(
                self.command(*words), input=text, capture_output=True, text=True, timeout=timeout_s,
                stdin=subprocess.DEVNULL if text is None else None,
            )  # fmt: skip
        except FileNotFoundError:
            raise JobError(
                "--on",
                "kubernetes",
                "there is no kubectl on this machine",
                "Install kubectl, or apply what `muster render` prints where it is installed",
            ) from None
        except subprocess.TimeoutExpired:
            raise JobError(
                "kubectl", " ".join(words), f"gave no answer within {timeout_s:.0f} s", "Check `kubectl cluster-info`"
            ) from None
        if done.returncode:
            raise Refused(" ".join((done.stderr or done.stdout).split())[-2000:] or f"exit code {done.returncode}")
        return done.stdout

    def demand(self, *words: str, text: str | None = None, timeout_s: float = 120) -> str:
        """Run it for the user, whose error a refusal is.

        Raises:
            JobError: it failed; with kubectl's words and a remedy.
        """
        try:
            return self.run(*words, text=text, timeout_s=timeout_s)
        except Refused as error:
            raise JobError("kubectl", " ".join(words), f"refused: {error}", remedy(str(error))) from None

    def get(self, *words: str) -> list[dict[str, Any]]:
        """The objects that `kubectl get WORDS` finds.

        Raises:
            Refused: it failed.
        """
        found = json.loads(self.run("get", *words, "--output=json", timeout_s=30))
        items = found["items"] if found["kind"].endswith("List") else [found]
        assert isinstance(items, list)
        return items


def remedy(problem: str) -> str:
    """What to do about kubectl's words."""
    for pattern, text in REMEDIES.items():
        if re.search(pattern, problem, re.IGNORECASE):
            return text
    return "See `kubectl explain`, and `muster render` for what was sent"
