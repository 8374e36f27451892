"""What the pods print, copied into the run folder here, and what can be told from it."""

import contextlib
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

from trainer.launch.kubernetes.kubectl import Kubectl, Refused, Unanswered
from trainer.launch.kubernetes.state import Pod, age_s
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder
from trainer.run.log_tail import last_lines, size

COPIED_UNTIL = ".kubernetes.json"
"""The file in `logs/` that says, for each pod, up to which time its log was copied."""
LINE = re.compile(r"^\[pod/([^/\s]+)/[^\]\s]+\] (\d{4}-\d\d-\d\dT[\d:.]+\S*)(?: (.*))?$", re.MULTILINE)
"""A line of `kubectl logs --prefix --timestamps`: pod, time, text. One without a time is no part of the log but the
node's own word on it, such as "unable to retrieve container logs"."""
OVERLAP_S = 30
"""Lines of different pods come in no order: ask again for the last ones, and drop what is known."""
LOGS_S, LOG_S = 10.0, 5.0
"""Seconds that the logs of all pods may take to come, and that of one pod. A node that is dead never sends any."""
LOGS_AT_ONCE = 16
"""Of how many pods the logs are asked for one by one, while some do not come: that of node 0, and others in turn."""
BEHIND = "behind"
"""In that file: the pods whose logs did not come the last time."""
STEP = re.compile(r"^step (\d+)/(\d+)  (?:epoch \d+  )?(.*)$", re.MULTILINE)
ATTEMPT = re.compile(r"^\[muster\] attempt (\d+) begins", re.MULTILINE)
WAITS = "[muster] waiting for "
WAITS_S = 30
"""For how long such a line holds: an agent that waits says so every ten seconds."""
LAST_WORD = re.compile(r"^\[muster\] (?:STOPPED|FAILED) \(exit (\d+)\): (.*)$", re.MULTILINE)


def copy_logs(kubectl: Kubectl, selector: str, run: RunFolder, pods: list[Pod]) -> list[str]:
    """Append what the pods printed since the last time to `logs/node-<i>.log`; return node 0's new lines.

    One request brings the logs of all. Where it does not end, because a node is dead, pods are asked one by one.
    """
    known: dict[str, Any] = read_json(run.logs / COPIED_UNTIL) or {}
    started = [pod for pod in pods if pod.started]
    behind = {pod.name for pod in started}.intersection(known.pop(BEHIND, []))
    newest: dict[str, str] = known
    silent = {pod.name for pod in started if pod.silent}
    if not silent and not behind:
        text = _read_logs(kubectl, [selector, "--max-log-requests=1000"], max(newest.values(), default=""), LOGS_S)
        behind = set() if text is not None else {pod.name for pod in started}
    else:
        first, *others = sorted((pod.name for pod in started if not pod.silent), key=_order(started)) or [""]
        some = [first, *random.sample(others, min(len(others), LOGS_AT_ONCE - 1))] if first else []
        with ThreadPoolExecutor(LOGS_AT_ONCE) as pool:
            answers = list(pool.map(lambda pod: _read_logs(kubectl, [pod], newest.get(pod, ""), LOG_S), some))
        came = {pod for pod, answer in zip(some, answers, strict=True) if answer is not None}
        behind = (behind | silent) - came | set(some) - came
        text = "\n".join(answer for answer in answers if answer)
    nodes = {pod.name: pod.node for pod in pods}
    texts: dict[int, list[str]] = {}
    for pod, time, line in LINE.findall(text or ""):
        if pod in nodes and time > newest.get(pod, ""):
            texts.setdefault(nodes[pod], []).append(line)
            newest[pod] = time
    for node, added in texts.items():
        with run.node_log(node).open("a") as log:
            log.writelines(f"{line}\n" for line in added)
    write_json(run.logs / COPIED_UNTIL, newest | {BEHIND: sorted(behind)})
    return texts.get(0, [])


def _order(pods: list[Pod]) -> Callable[[str], tuple[bool, int]]:
    """Node 0's pods first, the newest of them before all."""
    place = {pod.name: (pod.node != 0, -index) for index, pod in enumerate(sorted(pods, key=lambda pod: pod.created))}
    return lambda name: place[name]


def _read_logs(kubectl: Kubectl, which: list[str], newest: str, bound_s: float) -> str | None:
    """What was printed, a little earlier than `newest` and later; None: it did not come within the bound."""
    words = ["logs", *which, "--prefix", "--timestamps", "--tail=-1", "--ignore-errors"]
    if newest:
        since = datetime.fromisoformat(newest[:19]) - timedelta(seconds=OVERLAP_S)
        words.append(f"--since-time={since.isoformat()}Z")
    try:
        return kubectl.run(*words, timeout_s=bound_s)
    except Unanswered:
        return None
    except Refused:  # pods that have not started have no logs yet
        return ""


def copy_rank_log(kubectl: Kubectl, run: RunFolder, rank: int, pod: Pod) -> None:
    """Append what a rank printed since the last time, as it lies in its pod's run folder, where that can be read."""
    path = run.rank_log(rank)
    words = ["tail", f"--bytes=+{size(path) + 1}", f"/runs/{run.name}/{path.relative_to(run.path)}"]
    try:
        new = kubectl.run_bytes("exec", pod.name, "--container=agent", "--", *words, timeout_s=LOG_S)
    except (Refused, Unanswered):  # who may read logs need not start programs in pods
        return
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as log:
        log.write(new)


def progress(run: RunFolder) -> dict[str, Any]:
    """How far the run is, as node 0 has printed it: step, steps, metrics of the newest evaluation, attempt."""
    text = last_lines(run.node_log(0), most=1 << 20)
    steps, attempts = STEP.findall(text), ATTEMPT.findall(text)
    found: dict[str, Any] = {"attempt": int(attempts[-1])} if attempts else {}
    if steps:
        step, end, values = steps[-1]
        metrics = {}
        for name, _, value in (part.rpartition(" ") for part in values.split("  ")):
            with contextlib.suppress(ValueError):
                metrics[name] = float(value)
        found |= {"step": int(step), "steps": int(end), "metrics": metrics}
    return found


def what_agents_wait_for(run: RunFolder, pods: list[Pod]) -> str:
    """What an agent said last, if it is that it waits: for a node, a name, a port; empty otherwise."""
    newest = read_json(run.logs / COPIED_UNTIL) or {}
    for pod in pods:
        line = last_lines(run.node_log(pod.node)).rstrip().rpartition("\n")[2]
        if pod.lives and line.startswith(WAITS) and age_s(newest.get(pod.name, "1970-01-01T00:00:00Z")) < WAITS_S:
            return f"node {pod.node} waits for {line.removeprefix(WAITS)}"
    return ""


def last_word(run: RunFolder, begin: int) -> tuple[int, str] | None:
    """Exit code and reason, as the agent of node 0 said last; `begin`: the size of its log at the submission."""
    words = LAST_WORD.findall(last_lines(run.node_log(0), begin))
    return (int(words[-1][0]), words[-1][1]) if words else None
