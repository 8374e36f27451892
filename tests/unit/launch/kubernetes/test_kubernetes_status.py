"""A run's status on Kubernetes: what is made of Jobs and pods, and what is kept when these are removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.launch.kubernetes.platform import Kubernetes
from trainer.launch.kubernetes.state import INDEX, read_pod, read_status
from trainer.launch.platform import JobStatus, Phase
from trainer.records import write_json
from trainer.run.folder import RunFolder


@pytest.mark.parametrize("key", ["phase", "word"])
def test_an_end_that_is_kept_is_read_without_a_cluster(tmp_path: Path, key: str) -> None:
    """Version 0.1 called the phase a word."""
    run = RunFolder(tmp_path)
    write_json(run.exit, {key: "stopped", "reason": "stopped at time_limit_min", "code": 75})
    status = Kubernetes().status(run, {})
    assert status == JobStatus(Phase.STOPPED, "stopped at time_limit_min", 75)
    assert (f"{status.phase}", status.is_active) == ("stopped", False)


def job(*conditions: dict[str, Any]) -> dict[str, Any]:
    known = [{"status": "True", **each} for each in conditions]
    return {"metadata": {"name": "k"}, "spec": {"completions": 2}, "status": {"conditions": known}}


def pod(node: int, mark: str = "a", phase: str = "Running", deleted: str = "", **status: Any) -> dict[str, Any]:
    """A pod on the node worker-7 of the cluster; without more it runs."""
    states = {"containerStatuses": [{"state": {"running": {}}}], **status}
    metadata = {"name": f"k-{node}-{mark}", "annotations": {INDEX: f"{node}"}, "creationTimestamp": f"t-{mark}"}
    metadata |= {"deletionTimestamp": deleted} if deleted else {}
    return {"metadata": metadata, "spec": {"nodeName": "worker-7"}, "status": {"phase": phase, **states}}


def ended(code: int, message: str = "", finished: str = "") -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "message": message, "finishedAt": finished}}
    return {"phase": "Failed" if code else "Succeeded", "containerStatuses": [{"state": state}]}


def status_of(owner: dict[str, Any], *pods: dict[str, Any], events: tuple[dict[str, Any], ...] = ()) -> JobStatus:
    return read_status(owner, [read_pod(item) for item in pods], list(events))


def unpacking(**state: Any) -> dict[str, Any]:
    """Before the agent: its container waits for the one that unpacks the code."""
    waits = {"waiting": {"reason": "PodInitializing"}}
    return {"initContainerStatuses": [{"name": "code", "state": state}], "containerStatuses": [{"state": waits}]}


def test_the_step_before_the_agent_speaks_for_the_pod_until_it_is_done() -> None:
    no_image = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    status = status_of(job(), pod(0, phase="Pending", **unpacking(**no_image)))
    assert (status.phase, "ImagePullBackOff: no such image" in status.reason) == (Phase.PENDING, True)
    busy = read_pod(pod(0, phase="Pending", **unpacking(running={}), **UNREADY))
    assert (busy.silent, busy.started, busy.waiting) == (False, False, "starting")
    done = {"initContainerStatuses": unpacking(terminated={"exitCode": 0})["initContainerStatuses"]}
    assert read_pod(pod(0, **done)).started
    refused = unpacking(terminated={"exitCode": 64, "message": "ERROR: the run's code is not what was submitted"})
    failed = job({"type": "Failed", "reason": "PodFailurePolicy", "message": "exit code 64 matching"})
    status = status_of(failed, pod(0, phase="Failed", **refused), pod(1, **ended(75)))
    assert (status.phase, status.code) == (Phase.FAILED, 64)
    assert "is not what was submitted" in status.reason


UNREADY = {"conditions": [{"type": "Ready", "status": "False"}]}
LONG_AGO, FUTURE = "2026-01-01T00:00:00Z", "2099-01-01T00:00:00Z"


@pytest.mark.parametrize(("phase", "more"), [("Running", {}), ("Running", UNREADY), ("Pending", {})])
def test_a_job_that_failed_ends_though_a_dead_nodes_pod_stays(phase: str, more: dict[str, Any]) -> None:
    """Kubernetes says Failed only when all pods are gone, which this one never is."""
    stuck = pod(1, phase=phase, deleted=LONG_AGO, **more)
    failed = job({"type": "FailureTarget", "reason": "PodFailurePolicy", "message": "exit code 1 matching"})
    status = status_of(failed, pod(0), stuck)
    assert (status.phase, "its pods are ending: exit code 1" in status.reason) == (Phase.RUNNING, True)
    status = status_of(failed, pod(0, **ended(1, "rank 3 failed first")), stuck)
    assert (status.phase, status.code) == (Phase.FAILED, 1)
    assert status.reason.startswith("rank 3 failed first")
    assert status_of(job({"type": "SuccessCriteriaMet"}), pod(0, **ended(0, "accuracy")), stuck).reason == "accuracy"


def test_a_dead_node_is_named_with_what_helps() -> None:
    for silent in (pod(1, **UNREADY), pod(1, deleted=LONG_AGO)):
        status = status_of(job(), pod(0), silent)
        assert (status.phase, status.waits) == (Phase.RUNNING, True)
        assert status.reason.startswith("node worker-7 does not answer, with k-1-a. If that node is gone for good")
        assert "kubectl taint nodes worker-7 node.kubernetes.io/out-of-service=" in status.reason


def test_a_pod_that_is_drained_is_the_one_that_is_named() -> None:
    """Its container goes on until it has saved; that the kubelet calls it unready then says nothing of its node."""
    status = status_of(job(), pod(0), pod(1, deleted=FUTURE, **UNREADY))
    assert status.reason == "k-1-a was deleted or drained: it saves and stops, and will be replaced"


def test_a_node_without_a_pod_is_named_with_its_reason() -> None:
    assert "k-1" not in (reason := status_of(job(), pod(0)).reason)
    assert reason.startswith("node 1 has no pod yet: the Job controller makes one")
    event = {"reason": "FailedCreate", "type": "Warning", "message": "exceeded quota: cpus, requested: 1, used: 1"}
    status = status_of(job(), pod(0), events=(event,))
    assert (status.phase, status.waits) == (Phase.RUNNING, True)
    assert status.reason.startswith("node 1 has no pod yet: FailedCreate: exceeded quota")
    assert status.reason.endswith("ask for less in the site file (cpu, memory, gpu)")


def test_pods_that_were_killed_too_often_are_named_with_what_helps() -> None:
    failed = job({"type": "Failed", "reason": "BackoffLimitExceeded", "message": "reached the backoff limit"})
    killed = [pod(1, mark, **ended(137, "last line", f"2026-01-01T00:00:0{mark}Z")) for mark in "123"]
    status = status_of(failed, *killed, pod(0, **ended(75, "stopped")))
    assert (status.phase, status.code) == (Phase.FAILED, 137)
    for words in ("node 1 (k-1-3 on worker-7) was ended from outside: signal 9, as 2 pods", "describe pod k-1-3",
                  "raise memory", "last line"):  # fmt: skip
        assert words in status.reason
