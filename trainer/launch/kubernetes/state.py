"""Where a submission stands, from the objects in the cluster: phase, exit code, and the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.errors import DONE, FAILED, STOPPED, WRONG_JOB
from trainer.launch.platform import JobStatus, Phase

INDEX = "batch.kubernetes.io/job-completion-index"
"""The annotation that holds a pod's index, and so its node rank."""


@dataclass(frozen=True)
class Pod:
    """What matters of one pod."""

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
    disrupted: str
    """Why the cluster took it away: the message of its DisruptionTarget."""


def read_pod(item: dict[str, Any]) -> Pod:
    """A pod from its JSON."""
    status, metadata = item.get("status", {}), item["metadata"]
    statuses = status.get("containerStatuses") or [{}]
    container = statuses[0].get("state", {})
    ended = container.get("terminated") or {}
    conditions = {each["type"]: each for each in status.get("conditions", [])}
    disrupted = conditions.get("DisruptionTarget", {})
    message = ended.get("message", "").strip()
    if ended.get("reason") == "OOMKilled":
        message = f"out of memory: the pod used more than its limit; raise memory in the site file. {message}".strip()
    return Pod(
        metadata["name"], int(metadata.get("annotations", {}).get(INDEX, 0)), status.get("phase", "Pending"),
        bool(ended) or "running" in container, metadata.get("creationTimestamp", ""),
        ended.get("finishedAt", ""), ended.get("exitCode"),
        message or (status.get("message", "") if status.get("phase") == "Failed" else ""),
        _why_waiting(conditions, container.get("waiting") or {}, status.get("phase", "Pending")),
        disrupted.get("message", "") if disrupted.get("status") == "True" else "",
    )  # fmt: skip


def _why_waiting(conditions: dict[str, Any], waiting: dict[str, Any], phase: str) -> str:
    if phase != "Pending":
        return ""
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}".strip(": ")
    return f"{waiting.get('reason', 'starting')}: {waiting.get('message', '')}".strip(": ")


def read_status(owner: dict[str, Any], pods: list[Pod], warnings: list[str]) -> JobStatus:
    """The status of a Job or JobSet; `warnings`: what its events say, used while there are no pods."""
    conditions = {
        each["type"]: each for each in owner.get("status", {}).get("conditions", []) if each["status"] == "True"
    }
    done = conditions.get("Complete") or conditions.get("Completed")
    if done:
        return JobStatus(Phase.DONE, _last_message([pod for pod in pods if pod.code == DONE]), DONE)
    if "Failed" in conditions:
        return _read_failure(conditions["Failed"], pods)
    if owner["metadata"].get("deletionTimestamp"):
        return JobStatus(Phase.RUNNING, "being deleted: its pods save and stop")
    if owner["spec"].get("suspend"):
        queue = owner["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        return JobStatus(Phase.PENDING, f"suspended: waits in queue {queue}" if queue else "suspended")
    newest = newest_pods(pods)
    late = [f"{pod.name} waits: {pod.waiting}" for pod in newest.values() if pod.waiting]
    gone = [pod for pod in newest.values() if pod.phase == "Failed"]
    lost = [f"{pod.name} is gone ({_why_gone(pod)}) and will be replaced" for pod in gone]
    running = any(pod.phase in ("Running", "Succeeded") for pod in newest.values())
    reason = "; ".join([*late, *lost] or ([] if newest else warnings[-1:]))
    return JobStatus(Phase.RUNNING if running else Phase.PENDING, reason)


def newest_pods(pods: list[Pod]) -> dict[int, Pod]:
    """Each node's newest pod: replaced pods remain until their Job is deleted."""
    return {pod.node: pod for pod in sorted(pods, key=lambda pod: pod.created)}


def _why_gone(pod: Pod) -> str:
    if pod.disrupted:
        return pod.disrupted
    return "stopped on request" if pod.code == STOPPED else f"exit code {pod.code}"


def _read_failure(condition: dict[str, Any], pods: list[Pod]) -> JobStatus:
    reason = condition.get("reason", "")
    if reason == "DeadlineExceeded":
        return JobStatus(
            Phase.STOPPED, "stopped at the site's time_limit_min; it continues from its checkpoint", STOPPED
        )
    bad = [pod for pod in pods if pod.code not in (None, DONE, STOPPED)]
    newest = max(bad, key=lambda pod: pod.finished, default=None)
    code = next((pod.code for pod in bad if pod.code == WRONG_JOB), newest.code if newest else FAILED)
    message = _last_message([pod for pod in bad if pod.code == code] or pods)
    return JobStatus(Phase.FAILED, f"{message} ({condition.get('message', reason)})".lstrip(), code)


def _last_message(pods: list[Pod]) -> str:
    """The newest termination message of node 0, which plans the attempts; else of the first node that left one."""
    messages = newest_pods([pod for pod in pods if pod.message])
    return messages[min(messages)].message if messages else ""
