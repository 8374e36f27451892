"""The pages' commands for a cluster, typed in a copy of the project, against the API server in memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import documents
from fake_api_server import Cluster

RUNNING = {"phase": "Running", "containerStatuses": [{"name": "agent", "state": {"running": {}}}]}


def test_every_command_for_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    project = documents.copy_project(tmp_path / "muster")
    (project / "my-site.yaml").write_text("claim: runs\n")
    cluster.read_log = lambda pod, timestamps, since: f"hello from {pod}\n"
    for command in documents.commands("kubernetes"):
        if command.startswith("make k8s-logs"):
            labels = {"app.kubernetes.io/instance": "digits"}
            pod = {"metadata": {"name": "digits-0-abcde", "labels": labels}, "status": RUNNING}
            cluster.put("pods", {**pod, "spec": {"containers": [{"name": "agent"}]}})
        done = subprocess.run(
            ["bash", "-c", documents.shortened(command, "device=cpu")], cwd=project, env=documents.variables(project),
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command.startswith("make k8s-logs"):
            assert "hello from digits-0-abcde" in done.stdout
            cluster.remove("pods", "digits-0-abcde")
        elif command.startswith("make k8s-delete"):
            assert ("jobs", "digits") not in cluster.objects
        elif not command.startswith("muster"):
            assert ("jobs", "digits") in cluster.objects
