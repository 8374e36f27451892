"""kubectl, through which all requests to a cluster go, and what ends its refusals."""

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
    "persistentvolumeclaim.*(resize|immutable|less than)": "The claim is there already, with another size: set "
    "claim_size: null in the site file to use it as it is",
    "namespaces? .*not found": "Make that namespace, or name another one in the site file",
    "exceeded quota": "Ask for less in the site file (cpu, memory, gpu), or for more quota",
    "forbidden|unauthorized|provide credentials": "Ask for that right in this namespace: kubectl auth can-i --list",
    "field is immutable|being deleted|already exists": "An earlier submission of that name is still there: delete it "
    "with kubectl, or submit under another name",
    "connection|refused|no such host|time-?out|timed out|configuration|does not exist|current server": "Check "
    "`kubectl cluster-info`, and context and namespace in the site file",
}
"""Remedies by patterns in kubectl's message."""
ASTRAY = "; if you choose to ignore these errors, turn validation off with --validate=false"
"""What kubectl advises when it reaches no cluster, which would not help."""


class Unanswered(JobError):
    """kubectl gave no answer within its bound."""


class Refused(RuntimeError):
    """kubectl failed; the message is its own."""

    @property
    def remedy(self) -> str:
        otherwise = "`muster render` shows what was sent, and `kubectl explain` what is allowed"
        return next((text for known, text in REMEDIES.items() if re.search(known, str(self), re.IGNORECASE)), otherwise)


class Kubectl:
    """kubectl for one submission: with the context and namespace of its handle, about its Job or JobSet, `workload`."""

    def __init__(self, handle: dict[str, Any]) -> None:
        options = (f"--{key}={handle[key]}" for key in ("context", "namespace") if handle[key])  # else kubectl's own
        self.command = ["kubectl", *options]
        self.workload = f"{handle['kind']}/{handle['name']}"

    def run(self, *argv: str, text: str = "", timeout_s: float = 120) -> str:
        """Run it with `text` as its input; return its output. Raises JobError: no kubectl, or no answer; Refused."""
        return self.run_bytes(*argv, text=text, timeout_s=timeout_s).decode(errors="replace")

    def run_bytes(self, *argv: str, text: str = "", timeout_s: float = 120) -> bytes:
        """As `run`, with the output as it is."""
        try:
            command = [*self.command, *argv]
            done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=timeout_s)
        except OSError:
            remedy = "Install kubectl, or apply what `muster render` prints on a machine that has it"
            raise JobError("--on", "kubernetes", "there is no kubectl on this machine", remedy) from None
        except subprocess.TimeoutExpired:
            problem = f"gave no answer within {timeout_s:.0f} s"
            raise Unanswered("kubectl", " ".join(argv), problem, "Check `kubectl cluster-info`") from None
        if done.returncode:
            words = re.sub(ASTRAY, "", (done.stderr or done.stdout).decode(errors="replace"))
            lines = dict.fromkeys(words.splitlines())  # kubectl repeats some for each object
            raise Refused(" ".join(" ".join(lines).split())[-2000:] or f"exit code {done.returncode}")
        return done.stdout

    def run_or_raise(self, *argv: str, text: str = "") -> None:
        """Run it; a refusal is the user's error. Raises JobError: it failed; with kubectl's message and a remedy."""
        try:
            self.run(*argv, text=text)
        except Refused as error:
            raise JobError("kubectl", " ".join(argv), f"refused: {error}", error.remedy) from None

    def get(self, *argv: str) -> list[dict[str, Any]]:
        """The objects that `kubectl get ARGV` finds. Raises Refused: it failed."""
        answer = json.loads(self.run("get", *argv, "--output=json", timeout_s=30))
        items: list[dict[str, Any]] = answer["items"] if answer["kind"].endswith("List") else [answer]
        return items
