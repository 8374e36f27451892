"""Where a submission stands, from the objects in the cluster: phase, exit code, and the reason."""

from dataclasses import dataclass
from typing import Any

from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB
from trainer.launch.kubernetes.waits import Event, explain_wait
from trainer.launch.platform import JobStatus, Phase

INDEX = "batch.kubernetes.io/job-completion-index"
"""The annotation that holds a pod's index, and so its node rank."""


@dataclass(frozen=True)
class Pod:
    name: str
    node: int
    phase: str
    started: bool
    """Whether its container ran, so that there are logs."""
    created: str
    finished: str
    code: int | None
    message: str
    waiting: str
    """Why it does not run yet; empty when it runs or has ended."""
    gone: str
    """Why it failed: what the cluster says when it took the pod away, else its exit code."""


def read_pod(item: dict[str, Any]) -> Pod:
    status, metadata = item.get("status", {}), item["metadata"]
    phase = status.get("phase", "Pending")
    container = (status.get("containerStatuses") or [{}])[0].get("state", {})
    ended = container.get("terminated") or {}
    code, disrupted = ended.get("exitCode"), _true_conditions(item).get("DisruptionTarget", {}).get("message")
    message = ended.get("message", "").strip()
    if ended.get("reason") == "OOMKilled":
        message = f"out of memory: the pod used more than its limit; raise memory in the site file. {message}".strip()
    unscheduled = [each for each in status.get("conditions", [])
                   if each["type"] == "PodScheduled" and each["status"] == "False"]  # fmt: skip
    why = {"reason": "Unschedulable", **unscheduled[0]} if unscheduled else container.get("waiting") or {}
    waiting = f"{why.get('reason', 'starting')}: {why.get('message', '')}".strip(": ")
    return Pod(
        metadata["name"], int(metadata.get("annotations", {}).get(INDEX, 0)), phase,
        bool(ended) or "running" in container, metadata.get("creationTimestamp", ""),
        ended.get("finishedAt", ""), code,
        message or (status.get("message", "") if phase == "Failed" else ""), waiting if phase == "Pending" else "",
        disrupted or ("stopped on request" if code == STOPPED else f"exit code {code}"),
    )  # fmt: skip


def _true_conditions(item: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["type"]: each for each in item.get("status", {}).get("conditions", []) if each["status"] == "True"}


def read_status(owner: dict[str, Any], pods: list[Pod], events: list[Event]) -> JobStatus:
    """The status of a Job or JobSet; `events`: about the first pod that waits, or about itself while it has none."""
    conditions, metadata = _true_conditions(owner), owner["metadata"]
    if "Complete" in conditions or "Completed" in conditions:
        return JobStatus(Phase.DONE, _last_message([pod for pod in pods if pod.code == DONE]), DONE)
    if "Failed" in conditions:
        return _read_failure(conditions["Failed"], pods)
    if metadata.get("deletionTimestamp"):
        return JobStatus(Phase.RUNNING, "being deleted: its pods save and stop")
    if owner["spec"].get("suspend"):
        queue = metadata.get("labels", {}).get("kueue.x-k8s.io/queue-name")
        waiting = f"suspended: waits in queue {queue}" if queue else "suspended"
        return JobStatus(Phase.PENDING, explain_wait(waiting, events))
    newest = newest_pods(pods)
    late = [f"{pod.name} waits: {explain_wait(pod.waiting, events)}" for pod in newest if pod.waiting]
    late[1:] = [f"{len(late) - 1} more wait"] if len(late) > 1 else []
    lost = [f"{pod.name} is gone ({pod.gone}) and will be replaced" for pod in newest if pod.phase == "Failed"]
    running = any(pod.phase in ("Running", "Succeeded") for pod in newest)
    reason = "; ".join(late + lost) if newest else explain_wait("", events)
    return JobStatus(Phase.RUNNING if running else Phase.PENDING, reason, waits=bool(late + lost))


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
    return JobStatus(Phase.FAILED, f"{message} ({condition.get('message', reason)})".lstrip(), code)


def _last_message(pods: list[Pod]) -> str:
    """The newest termination message of node 0, which plans the attempts; else of the first node that left one."""
    messages = newest_pods([pod for pod in pods if pod.message])
    return messages[0].message if messages else ""
