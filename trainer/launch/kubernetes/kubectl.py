"""kubectl, through which all requests to a cluster go, and what the pods print, copied into the run folder here."""

import json
import re
import subprocess
from datetime import datetime, timedelta
from typing import Any

from trainer.errors import JobError
from trainer.launch.kubernetes.state import Pod
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder

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
COPIED_UNTIL = ".kubernetes.json"
"""The file in `logs/` that says, for each pod, up to which time its log was copied."""
LINE = re.compile(r"^\[pod/([^/\s]+)/[^\]\s]+\] (\d{4}-\d\d-\d\dT[\d:.]+\S*)(?: (.*))?$", re.MULTILINE)
"""A line of `kubectl logs --prefix --timestamps`: pod, time, text. One without a time is no part of the log but the
node's own word on it, such as "unable to retrieve container logs"."""
OVERLAP_S = 30
"""Lines of different pods come in no order: ask again for the last ones, and drop what is known."""


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
        try:
            command = [*self.command, *argv]
            done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout_s)
        except OSError:
            remedy = "Install kubectl, or apply what `muster render` prints on a machine that has it"
            raise JobError("--on", "kubernetes", "there is no kubectl on this machine", remedy) from None
        except subprocess.TimeoutExpired:
            problem = f"gave no answer within {timeout_s:.0f} s"
            raise JobError("kubectl", " ".join(argv), problem, "Check `kubectl cluster-info`") from None
        if done.returncode:
            raise Refused(" ".join((done.stderr or done.stdout).split())[-2000:] or f"exit code {done.returncode}")
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


def copy_logs(kubectl: Kubectl, selector: str, run: RunFolder, pods: list[Pod]) -> list[str]:
    """Append what the pods printed since the last time to `logs/node-<i>.log`; return node 0's new lines."""
    newest: dict[str, str] = read_json(run.logs / COPIED_UNTIL) or {}
    words = ["logs", selector, "--prefix", "--timestamps", "--tail=-1", "--ignore-errors", "--max-log-requests=1000"]
    if newest:
        since = datetime.fromisoformat(max(newest.values())[:19]) - timedelta(seconds=OVERLAP_S)
        words.append(f"--since-time={since.isoformat()}Z")
    try:
        lines = LINE.findall(kubectl.run(*words, timeout_s=60))
    except Refused:  # pods that have not started have no logs yet
        return []
    nodes = {pod.name: pod.node for pod in pods}
    texts: dict[int, list[str]] = {}
    for pod, time, text in lines:
        if pod in nodes and time > newest.get(pod, ""):
            texts.setdefault(nodes[pod], []).append(text)
            newest[pod] = time
    for node, added in texts.items():
        with run.node_log(node).open("a") as log:
            log.writelines(f"{text}\n" for text in added)
    write_json(run.logs / COPIED_UNTIL, newest)
    return texts.get(0, [])
