"""What is known of a run where the cluster's own word is missing or says little: what its pods print."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_api_server import Cluster
from kubernetes_runs import RUNNING, ended, finish, put_pod, submit

from trainer.launch import control
from trainer.launch.kubernetes import pod_logs
from trainer.launch.submit import submit_job

LINES = (
    "2026-01-01T00:00:01Z [muster] attempt 2 begins\n"
    "2026-01-01T00:00:02Z step 30/90  epoch 1  accuracy 0.5000  loss 1.2500\n"
)


def test_a_job_that_somebody_deleted_ends_as_its_pods_say(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    pod = put_pod(cluster, run, 0, "aaaaa", **RUNNING)
    pod["metadata"]["ownerReferences"] = []  # `kubectl delete job` leaves them to the garbage collector
    cluster.remove("jobs", run.name)
    word = "[muster] STOPPED (exit 75): stopped on request with a checkpoint saved"
    cluster.read_log = lambda *_: f"2026-01-01T00:00:03Z {word}\n"
    found = control.status(str(run))
    assert (found["state"], "was deleted" in found["reason"]) == ("running", True)
    cluster.remove("pods", pod["metadata"]["name"])
    found = control.status(str(run))
    assert (found["state"], found["code"]) == ("stopped", 75)
    assert "with a checkpoint saved" in found["reason"]
    submit_job(str(run), [], "kubernetes", site)
    cluster.remove("jobs", run.name)
    assert control.status(str(run))["state"] == "lost"  # that word was about the earlier submission


def test_step_metrics_and_attempt_are_those_that_were_printed(
    cluster: Cluster, tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs, when it is done, and when all of it is gone from the cluster."""
    run = submit(tmp_path, site)
    put_pod(cluster, run, 0, "aaaaa", **RUNNING)
    put_pod(cluster, run, 1, "bbbbb", **RUNNING)
    waits = "[muster] waiting for node 1 (x-1.x): 95 s left"
    cluster.read_log = lambda pod, *_: f"{LINES}2026-01-01T00:00:03Z {waits}\n" if "-0-" in pod else ""

    def check(state: str, reason: str) -> None:
        found = control.status(str(run))
        assert (found["state"], found["step"], found["steps"], found["attempt"]) == (state, 30, 90, 2)
        assert found["metrics"] == {"accuracy": 0.5, "loss": 1.25}
        assert found["reason"] == reason
        assert "step 30/90" in control.list_text([found])

    check("running", "step 30/90  epoch 1  accuracy 0.5000  loss 1.2500")  # long ago it waited
    monkeypatch.setattr(pod_logs, "age_s", lambda _: 5.0)
    check("running", "node 0 waits for node 1 (x-1.x): 95 s left")
    put_pod(cluster, run, 0, "aaaaa", **ended(0, "accuracy  0.98"))
    put_pod(cluster, run, 1, "bbbbb", **ended(0))
    finish(cluster, run, "Complete")
    check("done", "accuracy  0.98")
    cluster.objects.clear()
    (run / "logs/node-0.log").unlink()
    check("done", "accuracy  0.98")
