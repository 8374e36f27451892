"""What the pods print, copied into the run folder here: their own is on the cluster's side."""

import re
from datetime import datetime, timedelta

from trainer.launch.kubernetes.kubectl import Kubectl, Refused
from trainer.launch.kubernetes.state import Pod
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder

COPIED_UNTIL = ".kubernetes.json"
"""The file in `logs/` that says, for each pod, up to which time its log was copied."""
LINE = re.compile(r"^\[pod/([^/\s]+)/[^\]\s]+\] (\d{4}-\d\d-\d\dT[\d:.]+\S*)(?: (.*))?$", re.MULTILINE)
"""A line of `kubectl logs --prefix --timestamps`: pod, time, text. One without a time is no part of the log but the
node's own word on it, such as "unable to retrieve container logs"."""
OVERLAP_S = 30
"""Lines of different pods come in no order: ask again for the last ones, and drop what is known."""


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
