"""docs/getting-started.md is true: its project is submitted to an API server as the page says, and its code with it."""

from __future__ import annotations

import os
from pathlib import Path

import first_project
from fake_api_server import Cluster


def test_the_project_of_the_page(cluster: Cluster, tmp_path: Path) -> None:
    project = first_project.make(tmp_path, dict(os.environ))
    site = project / "k8s/site.yaml"
    name = "registry.example/team/digits"
    site.write_text(site.read_text().replace("image: digits", f"image: {name}").replace("claim: null", "claim: runs"))
    ((submit, status),) = first_project.blocks("On Kubernetes")
    first_project.type_command(project, submit, dict(os.environ))
    (job,) = (item for (kind, _), item in cluster.objects.items() if kind == "jobs")
    pod = job["spec"]["template"]["spec"]
    assert [each["image"] for each in (*pod["initContainers"], *pod["containers"])] == [name, name]
    assert any("-code" in name for kind, name in cluster.objects if kind == "configmaps")
    assert "pending" in first_project.type_command(project, status, dict(os.environ))
