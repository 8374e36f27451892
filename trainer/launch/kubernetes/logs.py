"""What the pods print, copied into the run folder here: their own is on the cluster's side."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path

from trainer.launch.kubernetes.kubectl import Kubectl, Refused
from trainer.launch.kubernetes.state import Pod
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder

LINE = re.compile(r"\[pod/([^/]+)/[^\]]+\] (\d{4}-\d\d-\d\dT[\d:.]+\S*)(?: (.*))?")
"""A line of `kubectl logs --prefix --timestamps`: pod, time, text. One without a time is no part of the log but the
node's own word on it, such as "unable to retrieve container logs"."""
OVERLAP_S = 30
"""Lines of different pods come in no order: ask again for the last ones, and drop what is known."""


def copy_logs(kubectl: Kubectl, selector: str, run: RunFolder, pods: list[Pod]) -> list[str]:
    """Append what the pods printed since the last time to `logs/node-<i>.log`; return node 0's new lines."""
    known = copied_until(run)
    newest: dict[str, str] = read_json(known) or {}
    words = ["logs", selector, "--prefix", "--timestamps", "--tail=-1", "--ignore-errors", "--max-log-requests=1000"]
    if newest:
        words.append(f"--since-time={_earlier(max(newest.values()))}")
    try:
        lines = [LINE.fullmatch(line) for line in kubectl.run(*words, timeout_s=60).splitlines()]
    except Refused:  # pods that have not started have no logs yet
        return []
    nodes = {pod.name: pod.node for pod in pods}
    texts: dict[int, list[str]] = {}
    for pod, time, text in (line.groups("") for line in lines if line is not None):
        if pod in nodes and time > newest.get(pod, ""):
            texts.setdefault(nodes[pod], []).append(text)
            newest[pod] = time
    for node, added in texts.items():
        with (run.node_log(node)).open("a") as log:
            log.writelines(f"{text}\n" for text in added)
    write_json(known, newest)
    return texts.get(0, [])


def copied_until(run: RunFolder) -> Path:
    """The file that says, for each pod, up to which time its log was copied."""
    return run.logs / ".kubernetes.json"


def _earlier(time: str) -> str:
    """A time of the API a little before `time`; seconds, as its queries take them."""
    moment = datetime.strptime(time[:19], "%Y-%m-%dT%H:%M:%S") - timedelta(seconds=OVERLAP_S)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
