"""Runs that muster submitted to the cluster in memory, and what a test lets become of them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_api_server import Cluster

from trainer.launch.submit import submit_job
from trainer.records import read_json

INDEX = "batch.kubernetes.io/job-completion-index"
RUNNING = {"phase": "Running", "containerStatuses": [{"name": "agent", "state": {"running": {}}}]}


def submit(tmp_path: Path, site: Path | None, *overrides: str) -> Path:
    words = ["nodes=2", "devices_per_node=1", "device=cpu", f"runs={tmp_path / 'my runs'}", *overrides]
    return submit_job("jobs/digits.yaml", words, "kubernetes", site).path


def handle_of(run: Path) -> dict[str, Any]:
    found = read_json(run / "handle.json")
    assert found
    return found


def put_pod(cluster: Cluster, run: Path, node: int, mark: str, **status: Any) -> dict[str, Any]:
    """A pod as the Job controller makes it, in the state that a test wants."""
    name = handle_of(run)["name"]
    owner = cluster.objects["jobs", name]
    metadata = {
        "name": f"{name}-{node}-{mark}", "annotations": {INDEX: str(node)},
        "labels": {"app.kubernetes.io/instance": name},
        "ownerReferences": [{"kind": "Job", "name": name, "uid": owner["metadata"]["uid"]}],
    }  # fmt: skip
    return cluster.put("pods", {"metadata": metadata, "spec": {"containers": [{"name": "agent"}]}, "status": status})


def ended(code: int, message: str = "", **more: Any) -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "message": message, "finishedAt": "2026-01-01T00:00:00Z", **more}}
    phase = "Failed" if code else "Succeeded"
    return {"phase": phase, "containerStatuses": [{"name": "agent", "state": state}]}


def finish(cluster: Cluster, run: Path, kind: str, **condition: Any) -> None:
    job = cluster.objects["jobs", handle_of(run)["name"]]
    job["status"]["conditions"] = [{"type": kind, "status": "True", **condition}]
    cluster.changed(job)
