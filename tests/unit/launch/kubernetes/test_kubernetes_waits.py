"""Why pods do not start: their own words, the cluster's events, and what ends the wait."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.launch.kubernetes.state import read_pod, read_status
from trainer.launch.kubernetes.waits import explain_wait


def event(reason: str, message: str = "", kind: str = "Warning") -> dict[str, Any]:
    return {"reason": reason, "message": message, "type": kind, "involvedObject": {"name": "k-0-abc"}}


PULL = 'Failed to pull image "nothing:1": not found'
SCHEDULED = event("Scheduled", "assigned to n1", "Normal")
AUTOSCALED = event("TriggeredScaleUp", "pod triggered scale-up: 0->1", "Normal")


@pytest.mark.parametrize(
    ("waiting", "events", "parts"),
    [
        ("ContainerCreating", [SCHEDULED, event("FailedAttachVolume", "Multi-Attach error for volume v")],
         ["ContainerCreating; FailedAttachVolume: Multi-Attach error for volume v", "ReadWriteMany"]),
        ("ContainerCreating", [event("FailedScheduling", "0/3 nodes"), SCHEDULED, event("Pulling", "image", "Normal")],
         ["ContainerCreating; Pulling: image", "when the image is there"]),
        ("ContainerCreating", [SCHEDULED, event("FailedMount", 'secret "keys" not found')],
         ['FailedMount: secret "keys" not found', "secrets in the site file"]),
        ("ImagePullBackOff: Back-off", [SCHEDULED, event("Failed", PULL), event("BackOff", "Back-off")],
         [f"Failed: {PULL}", "image_pull_secrets"]),
        ("CreateContainerConfigError: secret \"keys\" not found", [], ["the Secret or ConfigMap is there"]),
        ("Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
         [event("FailedScheduling", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")],
         ["3 Insufficient nvidia.com/gpu. It starts when a node has room"]),
        ("Unschedulable: 0/3 nodes", [event("FailedScheduling", "0/3 nodes")], ["when a node has room"]),
        ("Unschedulable: pod has unbound immediate PersistentVolumeClaims", [], ["kubectl describe pvc"]),
        ("", [event("FailedCreate", "exceeded quota: gpus, requested: 8, used: 8")], ["ask for less in the site file"]),
        ("suspended: waits in queue q", [event("Pending", "couldn't assign flavors to pod set", "Normal")],
         ["queue q; Pending: couldn't assign", "its queue has room"]),
        ("starting", [AUTOSCALED], ["starting; TriggeredScaleUp: pod triggered scale-up: 0->1"]),
        ("starting", [], ["starting"]),
    ],
)  # fmt: skip
def test_what_is_waited_for(waiting: str, events: list[dict[str, Any]], parts: list[str]) -> None:
    text = explain_wait(waiting, events)
    assert [part for part in parts if part not in text] == [], text
    assert text.count("0/3 nodes") <= 1


def test_one_pod_stands_for_all_that_wait() -> None:
    def pod(node: int, phase: str) -> dict[str, Any]:
        states = [{"state": {"waiting": {"reason": "ContainerCreating"}}}] if phase == "Pending" else []
        index = {"batch.kubernetes.io/job-completion-index": str(node)}
        return {
            "metadata": {"name": f"k-{node}-abc", "annotations": index},
            "status": {"phase": phase, "containerStatuses": states},
        }

    owner = {"metadata": {"name": "k"}, "spec": {}, "status": {}}
    status = read_status(owner, [read_pod(pod(node, "Pending")) for node in range(3)], [event("FailedMount", "no")])
    assert (status.phase, status.waits) == ("pending", True)
    assert status.reason.startswith("k-0-abc waits: ContainerCreating; FailedMount: no. It starts when the volume")
    assert status.reason.endswith("; 2 more wait")
    status = read_status(owner, [read_pod(pod(0, "Running")), read_pod(pod(1, "Pending"))], [])
    assert (status.phase, status.waits) == ("running", True)
    assert not read_status(owner, [read_pod(pod(0, "Running"))], []).waits
