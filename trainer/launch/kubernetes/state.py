"""Where a submission stands, from the objects in the cluster: phase, exit code, and the reason."""

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB
from trainer.launch.kubernetes.waits import Event, explain_wait
from trainer.launch.platform import JobStatus, Phase

CODE = "code"
"""The container that unpacks the run's code, before the agent's."""
INDEX = "batch.kubernetes.io/job-completion-index"
"""The annotation that holds a pod's index, and so its node rank."""
LATE_S = 60
"""How long after its grace period a pod may still be there before its node counts as dead: kubelets report late."""
DEAD_NODE = (
    "If that node is gone for good, say so, and the pod is replaced: kubectl taint nodes {host} "
    "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute, or delete the node"
)
PAUSE = "the Job controller makes one, after a pause of 10 s or more if one was lost"
OUT_OF_MEMORY = "out of memory: the pod used more than its limit; raise memory in the site file"


@dataclass(frozen=True)
class Pod:
    name: str
    node: int
    host: str
    """The node of the cluster that it is on; empty before it has one."""
    phase: str
    started: bool
    """Whether its container ran, so that there are logs."""
    created: str
    finished: str
    code: int | None
    message: str
    killed: str
    """How its container was ended from outside; empty when it ended by itself, or runs."""
    waiting: str
    """Why it does not run yet; empty when it runs or has ended."""
    gone: str
    """Why it failed: what the cluster says when it took the pod away, else its exit code."""
    leaving: bool
    """Whether it was deleted, as a drain does, and still runs: it saves and stops."""
    silent: bool
    """Whether its node does not answer, so that nobody knows what it does, and its log cannot be read."""

    @property
    def lives(self) -> bool:
        """Whether it has not ended, and its node can say so."""
        return self.phase in ("Pending", "Running") and not self.silent


def read_pod(item: dict[str, Any]) -> Pod:
    status, metadata = item.get("status", {}), item["metadata"]
    phase = status.get("phase", "Pending")
    agent = (status.get("containerStatuses") or [{}])[0].get("state", {})
    steps = [each.get("state", {}) for each in status.get("initContainerStatuses", []) if each["name"] == CODE]
    late = [step for step in steps if step.get("terminated", {}).get("exitCode") != DONE]
    container = (late or [agent])[0]  # the step before the agent speaks for the pod until it has unpacked the code
    ended = container.get("terminated") or {}
    conditions = {each["type"]: each for each in status.get("conditions", [])}
    code, disrupted = ended.get("exitCode"), _true_conditions(item).get("DisruptionTarget", {})
    message, killed = ended.get("message", "").strip(), ""
    if ended.get("reason") == "OOMKilled":
        killed = OUT_OF_MEMORY
        message = f"{killed}. {message}".strip()
    elif code is not None and code > 128:
        killed = f"signal {code - 128}"
    unscheduled = conditions.get("PodScheduled", {}).get("status") == "False"
    why = {"reason": "Unschedulable", **conditions["PodScheduled"]} if unscheduled else container.get("waiting") or {}
    waiting = f"{why.get('reason', 'starting')}: {why.get('message', '')}".strip(": ")
    deleted = metadata.get("deletionTimestamp")  # when its grace period ends
    unasked = not deleted or disrupted.get("reason") == "DeletionByTaintManager"
    unready = "running" in agent and conditions.get("Ready", {}).get("status") == "False"
    return Pod(
        metadata["name"], int(metadata.get("annotations", {}).get(INDEX, 0)), item.get("spec", {}).get("nodeName", ""),
        phase, "terminated" in agent or "running" in agent, metadata.get("creationTimestamp", ""),
        ended.get("finishedAt", ""), code,
        message or (status.get("message", "") if phase == "Failed" else ""), killed,
        waiting if phase == "Pending" else "",
        disrupted.get("message") or ("stopped on request" if code == STOPPED else killed or f"exit code {code}"),
        bool(deleted) and phase == "Running",
        # The kubelet says of a container that runs that it is ready; the control plane takes that back when it is late.
        phase in ("Pending", "Running") and ((unready and unasked) or (bool(deleted) and age_s(deleted) > LATE_S)),
    )  # fmt: skip


def age_s(timestamp: str) -> float:
    """Seconds since a time of the API's."""
    return time.time() - datetime.fromisoformat(timestamp[:19]).replace(tzinfo=timezone.utc).timestamp()


def _true_conditions(item: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["type"]: each for each in item.get("status", {}).get("conditions", []) if each["status"] == "True"}


def read_status(owner: dict[str, Any], pods: list[Pod], events: list[Event]) -> JobStatus:
    """The status of a Job or JobSet; `events`: about the first pod that waits, or about itself while it lacks some."""
    conditions, metadata = _true_conditions(owner), owner["metadata"]
    living = [pod for pod in pods if pod.lives]
    # The first word on an end comes before the pods are gone; where a node is dead, the last one never comes.
    done = "Complete" in conditions or "Completed" in conditions or ("SuccessCriteriaMet" in conditions and not living)
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    if done:
        return JobStatus(Phase.DONE, _last_message([pod for pod in pods if pod.code == DONE]), DONE)
    if failed and ("Failed" in conditions or not living):
        return _read_failure(failed, pods)
    if failed:
        return JobStatus(Phase.RUNNING, f"it has failed, and its pods are ending: {failed.get('message', '')}")
    if metadata.get("deletionTimestamp"):
        return JobStatus(
            Phase.RUNNING, "; ".join(["being deleted: its pods save and stop", *_silent(newest_pods(pods))])
        )
    if owner["spec"].get("suspend"):
        queue = metadata.get("labels", {}).get("kueue.x-k8s.io/queue-name")
        waiting = f"suspended: waits in queue {queue}" if queue else "suspended"
        return JobStatus(Phase.PENDING, explain_wait(waiting, events))
    newest = newest_pods(pods)
    late = [f"{pod.name} waits: {explain_wait(pod.waiting, events)}" for pod in newest if pod.waiting]
    late[1:] = [f"{len(late) - 1} more wait"] if len(late) > 1 else []
    leaving = [f"{pod.name} was deleted or drained: it saves and stops, and will be replaced"
               for pod in newest if pod.leaving and not pod.silent]  # fmt: skip
    lost = [f"{pod.name} is gone ({pod.gone}) and will be replaced" for pod in newest if pod.phase == "Failed"]
    missing = [] if late or not pods else _missing(owner, newest, events)
    running = any(pod.phase in ("Running", "Succeeded") for pod in newest)
    reasons = [*late, *leaving, *lost, *_silent(newest), *missing]
    reason = "; ".join(reasons) if newest else explain_wait("", events)
    return JobStatus(Phase.RUNNING if running else Phase.PENDING, reason, waits=bool(reasons))


def _silent(pods: list[Pod]) -> list[str]:
    """What to know about pods whose node does not answer."""
    names: dict[str, list[str]] = {}
    for pod in pods:
        if pod.silent:
            names.setdefault(pod.host, []).append(pod.name)
    return [
        f"node {host} does not answer, with {', '.join(found)}. {DEAD_NODE.format(host=host)}"
        for host, found in sorted(names.items())
    ]


def missing_nodes(owner: dict[str, Any], pods: list[Pod]) -> list[int]:
    """The node ranks for which there is no pod, not even one that has ended: it could not be made."""
    known = {pod.node for pod in pods}
    return [node for node in range(owner["spec"].get("completions", 0)) if node not in known]


def _missing(owner: dict[str, Any], pods: list[Pod], events: list[Event]) -> list[str]:
    nodes = missing_nodes(owner, pods)
    if not nodes:
        return []
    which = f"node {nodes[0]} has" if len(nodes) == 1 else f"nodes {nodes[0]} and {len(nodes) - 1} more have"
    return [f"{which} no pod yet: {explain_wait('', events) or PAUSE}"]


def newest_pods(pods: list[Pod]) -> list[Pod]:
    """Each node's newest pod, by node: replaced pods remain until their Job is deleted."""
    newest = {pod.node: pod for pod in sorted(pods, key=lambda pod: pod.created)}
    return [newest[node] for node in sorted(newest)]


def _read_failure(condition: dict[str, Any], pods: list[Pod]) -> JobStatus:
    reason = condition.get("reason", "")
    if reason == "DeadlineExceeded":
        text = "stopped at the site's time_limit_min; it continues from its checkpoint"
        return JobStatus(Phase.STOPPED, text, STOPPED)
    bad = [pod for pod in pods if pod.code not in (None, DONE, STOPPED)]
    newest = max(bad, key=lambda pod: pod.finished, default=None)
    code = next((pod.code for pod in bad if pod.code == WRONG_JOB), newest.code if newest else FAILED)
    message = _last_message([pod for pod in bad if pod.code == code] or pods)
    killed = sorted((pod for pod in bad if pod.killed), key=lambda pod: pod.finished)
    if killed and killed[-1].killed not in message:
        message = f"{_how_killed(killed)}. {message}".rstrip()
    return JobStatus(Phase.FAILED, f"{message} ({condition.get('message', reason)})".lstrip(), code)


def _how_killed(pods: list[Pod]) -> str:
    """Which node, how, how often, and what to do about the last one: the Job's own word names none of them."""
    pod, times = pods[-1], f", as {len(pods) - 1} pods before it" if len(pods) > 1 else ""
    host = f" on {pod.host}" if pod.host else ""
    text = f"node {pod.node} ({pod.name}{host}) was ended from outside: {pod.killed}{times}"
    hint = f". `kubectl describe pod {pod.name}` says more; if it was for memory, raise memory in the site file"
    return text if pod.killed == OUT_OF_MEMORY else text + hint


def _last_message(pods: list[Pod]) -> str:
    """The newest termination message of node 0, which plans the attempts; else of the first node that left one."""
    messages = newest_pods([pod for pod in pods if pod.message])
    return messages[0].message if messages else ""
