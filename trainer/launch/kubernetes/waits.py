"""Why pods do not start, from their own words and from the cluster's events, and what ends the wait."""

import re
from typing import Any

Event = dict[str, Any]
ENDS = {
    "exceeded quota": "It goes on when there is quota again; or ask for less in the site file (cpu, memory, gpu)",
    "ErrImage|ImagePull|InvalidImageName": "It starts when the nodes can pull the image: see image, image_pull_secrets "
    "and image_pull_policy in the site file",
    "Multi-Attach": "It starts when the volume is free: a ReadWriteOnce volume serves one node, so claim needs "
    "ReadWriteMany",
    "FailedMount|FailedAttachVolume|unbound|persistentvolumeclaim": "It starts when the volume is there: see "
    "`kubectl describe pvc`, and claim, mounts and secrets in the site file",
    "CreateContainerConfigError": "It starts when the Secret or ConfigMap is there: see secrets in the site file",
    "Insufficient|Unschedulable|FailedScheduling": "It starts when a node has room: `kubectl describe nodes` shows "
    "what is free; or ask for less in the site file (cpu, memory, gpu, node_selector)",
    "Pulling": "It starts when the image is there",
    "inadmissible|couldn't assign|insufficient": "It starts when its queue has room",
}
"""What ends a wait, by patterns in what is said about it."""


def explain_wait(waiting: str, events: list[Event]) -> str:
    """What is waited for; `waiting`: what the pod itself says, `events`: those about it, the oldest first."""
    word = _telling(events)
    text = "; ".join(part for part in (waiting, word if word.partition(": ")[2] not in waiting else "") if part)
    ends = next((f". {end}" for known, end in ENDS.items() if re.search(known, text)), "")
    return text.rstrip(".") + ends if ends else text


def _telling(events: list[Event]) -> str:
    """The event that says most: the newest warning since the pod got its node, else the newest event."""
    for index, event in enumerate(events):
        if event["reason"] == "Scheduled":  # what was said about finding a node is over
            events = events[index:]
            break
    warnings = [event for event in events if event.get("type") == "Warning" and event["reason"] != "BackOff"]
    newest = (warnings or events)[-1:]
    return f"{newest[0]['reason']}: {newest[0].get('message', '')}".strip(": ") if newest else ""
