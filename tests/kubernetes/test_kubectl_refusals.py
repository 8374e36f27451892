"""What muster says when kubectl, the cluster's API server or its quota refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_api_server import Cluster
from kubernetes_runs import submit
from typer.testing import CliRunner

from trainer.errors import JobError, MaybeAccepted
from trainer.launch import control
from trainer.launch.cli import app
from trainer.launch.submit import submit_job
from trainer.records import write_json


def test_a_running_run_is_not_submitted_again(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    with pytest.raises(JobError, match="is running"):
        submit_job(str(run), [], "kubernetes", site)


@pytest.mark.parametrize(
    ("code", "reason", "message", "remedy"),
    [
        (403, "Forbidden", 'jobs.batch is forbidden: User "me" cannot create resource "jobs"', "auth can-i"),
        (403, "Forbidden", "pods is forbidden: exceeded quota: compute, requested: cpu=96", "more quota"),
        (409, "AlreadyExists", 'jobs.batch "x" already exists', "earlier submission"),
    ],
)
def test_a_refusal_is_one_error_with_a_remedy(
    cluster: Cluster, tmp_path: Path, site: Path, code: int, reason: str, message: str, remedy: str
) -> None:
    cluster.refusal = lambda method, plural, body: (code, reason, message) if plural == "jobs" else None
    with pytest.raises(JobError) as caught:
        submit(tmp_path, site)
    assert message in str(caught.value)
    assert remedy in str(caught.value)
    assert cluster.objects == {}  # nothing was made of what goes before the Job


def test_a_job_that_the_cluster_may_have_taken_keeps_its_run(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    """The API server agrees when it is asked, and fails when the objects are made."""
    asked: list[str] = []

    def refuse(method: str, plural: str, body: Any) -> tuple[int, str, str] | None:
        asked.extend([method] * (plural == "jobs" and method != "GET"))
        return (504, "Timeout", "request did not complete within 60s") if len(asked) > 1 else None

    cluster.refusal = refuse
    with pytest.raises(JobError, match=r"`kubectl get jobs\.batch/.*` says whether it was made"):
        submit(tmp_path, site)
    (job,) = tmp_path.glob("**/digits-*/job.yaml")
    assert "did not complete" in control.status(str(job.parent))["reason"]


@pytest.mark.parametrize("refused", ["networkpolicies", "services", "jobs"])
def test_what_was_made_before_a_refusal_is_removed(cluster: Cluster, tmp_path: Path, site: Path, refused: str) -> None:
    """The API server agrees when it is asked, and refuses one object when they are made."""
    posted: list[str] = []

    def refuse(method: str, plural: str, body: Any) -> tuple[int, str, str] | None:
        posted.extend([plural] * (method == "POST"))
        late = method == "POST" and plural == refused and posted.count(plural) > 1
        return (403, "Forbidden", f'{plural} is forbidden: User "me" cannot create it') if late else None

    cluster.refusal = refuse
    site.write_text("claim: runs\nclaim_size: 1Gi\n")
    with pytest.raises(JobError, match="auth can-i") as caught:
        submit(tmp_path, site)
    assert not isinstance(caught.value, MaybeAccepted)
    assert list(cluster.objects) == [("persistentvolumeclaims", "runs")]
    assert posted.count("jobs") == (2 if refused == "jobs" else 1), "the Job was made without what it needs"
    assert list(tmp_path.glob("**/digits-*/job.yaml")) == []


def test_a_claim_that_is_there_is_left_alone(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    """A real API server refuses another size, with words about rights."""
    site.write_text("claim: runs\nclaim_size: 100Gi\n")
    cluster.put("persistentvolumeclaims", {"metadata": {"name": "runs"}, "spec": {"resources": "1Gi"}})
    before = dict(cluster.objects["persistentvolumeclaims", "runs"])
    run = submit(tmp_path, site)
    assert cluster.objects["persistentvolumeclaims", "runs"] == before
    assert ("jobs", run.name) in cluster.objects


def test_a_missing_namespace_is_named_once(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    site.write_text("claim: runs\nnamespace: nowhere\n")
    cluster.refusal = lambda *_: (404, "NotFound", 'namespaces "nowhere" not found')
    with pytest.raises(JobError, match="Make that namespace") as caught:
        submit(tmp_path, site)
    assert str(caught.value).count('namespaces "nowhere" not found') == 1


def test_a_missing_jobset_api_is_named(cluster: Cluster, tmp_path: Path, site: Path, monkeypatch: Any) -> None:
    import fake_api_server

    monkeypatch.delitem(fake_api_server.RESOURCES, "jobsets")
    site.write_text("kind: jobset\nclaim: runs\n")
    with pytest.raises(JobError, match="kind: job in the site file"):
        submit(tmp_path, site)


def test_no_cluster_and_no_kubectl(cluster: Cluster, tmp_path: Path, site: Path, monkeypatch: Any) -> None:
    run = submit(tmp_path, site)
    config = tmp_path / "nobody"
    text = json.loads((tmp_path / "kubeconfig").read_text())
    text["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
    write_json(config, text)
    monkeypatch.setenv("KUBECONFIG", str(config))
    found = control.status(str(run))
    assert (found["state"], "cluster-info" in found["reason"]) == ("unknown", True)
    assert CliRunner().invoke(app, ["status", str(run)]).exit_code == 1
    with pytest.raises(JobError, match="cluster-info"):
        submit(tmp_path, site)
    with pytest.raises(JobError, match="may still be running: kubectl failed"):
        submit_job(str(run), [], "kubernetes", site)
    monkeypatch.setenv("PATH", "")
    found = control.status(str(run))
    assert (found["state"], "no kubectl on this machine" in found["reason"]) == ("unknown", True)
    with pytest.raises(JobError, match="no kubectl on this machine"):
        submit(tmp_path, site)
