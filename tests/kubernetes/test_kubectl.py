"""muster's verbs on Kubernetes, through the real kubectl: what is sent, and what is made of the cluster's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api_server import Cluster
from kubernetes_runs import RUNNING, ended, finish, handle_of, put_pod, submit

from trainer.errors import JobError
from trainer.launch import control
from trainer.launch.kubernetes.platform import Kubernetes
from trainer.launch.listing import compare_sweep
from trainer.launch.submit import render_job, submit_job
from trainer.launch.sweep import submit_sweep
from trainer.run.folder import RunFolder


def test_submit_sends_what_render_prints(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    rendered = list(yaml.safe_load_all((run / "plan" / "kubernetes.txt").read_text()))
    assert [document["kind"] for document in rendered] == ["NetworkPolicy", "ConfigMap", "Service", "Job"]
    assert len(cluster.objects) == 5
    for (kind, name), found in cluster.objects.items():
        if kind == "secrets":
            continue
        (sent,) = (document for document in rendered if document["kind"] == found["kind"])
        assert name == sent["metadata"]["name"] == run.name
        for key in ("spec", "data", "immutable"):
            assert found.get(key) == sent.get(key)
    job = cluster.objects["jobs", run.name]
    owners = [item["metadata"].get("ownerReferences") for item in cluster.objects.values() if item is not job]
    reference = {"apiVersion": "batch/v1", "kind": "Job", "name": run.name, "uid": job["metadata"]["uid"]}
    assert owners == [[reference]] * 4
    assert render_job(str(run), [], "kubernetes", site) + "\n" == (run / "plan" / "kubernetes.txt").read_text()


def test_a_sweep_is_a_job_for_each_value(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    words = ["device=cpu", "devices_per_node=1", f"runs={tmp_path / 'runs'}"]
    made = submit_sweep("jobs/digits.yaml", words, "kubernetes", site, "train.lr=0.1,0.01")
    jobs = [name for kind, name in cluster.objects if kind == "jobs"]
    assert jobs == [handle_of(run.path)["name"] for run in made.runs] and len(set(jobs)) == 2
    finish(cluster, made.runs[1].path, "Complete")
    assert [run["state"] for run in compare_sweep(made)["runs"]] == ["pending", "done"]
    control.cancel(str(made.folder))
    assert [name for kind, name in cluster.objects if kind == "jobs"] == jobs[1:], "one has ended"


def test_the_secret_is_in_its_secret_alone(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    secret = (run / "secret").read_text().strip()
    assert cluster.objects["secrets", run.name]["stringData"] == {"secret": secret}
    others = [found for (kind, _), found in cluster.objects.items() if kind != "secrets"]
    kept = [path for path in run.rglob("*") if path.is_file() and secret in path.read_text() and path.name != "secret"]
    assert secret not in json.dumps(others) and kept == []
    [pod] = cluster.objects["jobs", run.name]["spec"]["template"]["spec"]["containers"]
    (source,) = (entry["valueFrom"] for entry in pod["env"] if entry["name"] == "MUSTER_SECRET")
    assert source == {"secretKeyRef": {"name": run.name, "key": "secret"}}


def test_the_claim_belongs_to_nobody(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    site.write_text("claim: runs\nclaim_size: 1Gi\n")
    run = submit(tmp_path, site)
    assert "ownerReferences" not in cluster.objects["persistentvolumeclaims", "runs"]["metadata"]
    cluster.remove("jobs", run.name)
    assert list(cluster.objects) == [("persistentvolumeclaims", "runs")]


def test_a_jobset_makes_its_own_service(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    site.write_text("kind: jobset\nclaim: runs\n")
    run = submit(tmp_path, site)
    assert sorted(kind for kind, _ in cluster.objects) == ["configmaps", "jobsets", "networkpolicies", "secrets"]
    assert control.status(str(run))["state"] == "pending"
    job = cluster.objects["jobsets", handle_of(run)["name"]]
    job["status"]["conditions"] = [{"type": "Completed", "status": "True"}]
    assert Kubernetes().status(RunFolder(run), handle_of(run)).phase == "done"


def test_without_a_claim_it_says_so(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(tmp_path, None)
    assert "cannot resume" in capsys.readouterr().err


def test_status_says_why_pods_wait(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    assert control.status(str(run))["state"] == "pending"
    event = {"reason": "FailedCreate", "type": "Warning", "message": "exceeded quota: gpus, requested: 8, used: 8",
             "metadata": {"name": "e"}, "involvedObject": {"kind": "Job", "name": run.name}}  # fmt: skip
    cluster.put("events", event)
    assert "exceeded quota" in control.status(str(run))["reason"]
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes fit"}
    put_pod(cluster, run, 0, "aaaaa", phase="Pending", conditions=[unschedulable])
    found = control.status(str(run))
    assert found["state"] == "pending"
    assert "0/2 nodes fit" in found["reason"]
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    put_pod(cluster, run, 0, "aaaaa", **RUNNING)
    put_pod(cluster, run, 1, "bbbbb", phase="Pending", containerStatuses=[{"state": waiting}])
    found = control.status(str(run))
    assert found["state"] == "running"
    assert "ImagePullBackOff: no such image" in found["reason"]


def test_logs_are_copied_once_and_follow_a_replaced_pod(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    lines = {
        f"{run.name}-0-aaaaa": ["2026-01-01T00:00:01.1Z [muster] hello", "2026-01-01T00:00:02.5Z step 1/9  loss 2"],
        f"{run.name}-1-bbbbb": ["2026-01-01T00:00:01.5Z [muster] node 1"],
        f"{run.name}-0-ccccc": ["2026-01-01T00:01:00Z step 2/9  loss 1"],
    }  # fmt: skip
    asked = []

    def read_log(pod: str, timestamps: bool, since: str) -> str:
        asked.append(since)
        return "".join(f"{line}\n" for line in lines[pod] if line >= since)

    cluster.read_log = read_log
    put_pod(cluster, run, 0, "aaaaa", **RUNNING)
    put_pod(cluster, run, 1, "bbbbb", **RUNNING)
    assert control.status(str(run))["reason"] == "step 1/9  loss 2"
    assert control.status(str(run))["reason"] == "step 1/9  loss 2"
    assert (run / "logs/node-0.log").read_text() == "[muster] hello\nstep 1/9  loss 2\n"
    assert (run / "logs/node-1.log").read_text() == "[muster] node 1\n"
    put_pod(cluster, run, 0, "aaaaa", **ended(75))
    put_pod(cluster, run, 0, "ccccc", **RUNNING)
    assert control.status(str(run))["reason"] == "step 2/9  loss 1"
    assert (run / "logs/node-0.log").read_text().splitlines()[-1] == "step 2/9  loss 1"
    assert asked[0] == ""
    assert asked[-1] == "2025-12-31T23:59:32Z"


def test_a_nodes_word_on_a_log_is_no_part_of_it(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    put_pod(cluster, run, 0, "aaaaa", **RUNNING)
    put_pod(cluster, run, 1, "bbbbb", **RUNNING)
    answers = ["unable to retrieve container logs for containerd://1\n", "2026-01-01T00:00:01.1Z step 1/9  loss 2\n"]
    cluster.read_log = lambda pod, *_: answers.pop(0) if "-0-" in pod and answers else ""
    assert control.status(str(run))["reason"] == ""
    assert control.status(str(run))["reason"] == "step 1/9  loss 2"
    assert (run / "logs/node-0.log").read_text() == "step 1/9  loss 2\n"


def test_the_end_is_told_by_node_0_and_remembered(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    put_pod(cluster, run, 0, "aaaaa", **ended(0, "accuracy  0.98\ntime  3 s"))
    put_pod(cluster, run, 1, "bbbbb", **ended(0))
    finish(cluster, run, "Complete")
    found = control.status(str(run))
    assert (found["state"], found["code"], found["reason"]) == ("done", 0, "accuracy  0.98\ntime  3 s")
    cluster.objects.clear()  # as its ttlSecondsAfterFinished does
    assert control.status(str(run))["state"] == "done"


@pytest.mark.parametrize(
    ("pods", "condition", "word", "code", "reason"),
    [
        ([(0, ended(64, "ERROR: train.lr is wrong")), (1, ended(75))],
         {"reason": "PodFailurePolicy", "message": "exit code 64 matching"}, "failed", 64, "train.lr is wrong (exit"),
        ([(0, ended(1, "rank 3 failed first")), (1, ended(1, "node 1's view"))],
         {"reason": "PodFailurePolicy", "message": "exit code 1 matching"}, "failed", 1, "rank 3 failed first (exit"),
        ([(1, ended(137, "last line", reason="OOMKilled")), (0, ended(75))],
         {"reason": "BackoffLimitExceeded", "message": "reached the limit"}, "failed", 137, "out of memory"),
        ([(0, ended(75, "stopped"))], {"reason": "DeadlineExceeded"}, "stopped", 75, "time_limit_min"),
        ([], {"reason": "BackoffLimitExceeded", "message": "reached the limit"}, "failed", 1, "reached the limit"),
    ],
)  # fmt: skip
def test_a_failure_is_explained(
    cluster: Cluster, tmp_path: Path, site: Path, pods: Any, condition: Any, word: str, code: int, reason: str
) -> None:
    run = submit(tmp_path, site)
    for node, status in pods:
        put_pod(cluster, run, node, "aaaaa", **status)
    finish(cluster, run, "Failed", **condition)
    found = control.status(str(run))
    assert (found["state"], found["code"]) == (word, code)
    assert reason in found["reason"]


def test_an_evicted_pod_is_named_while_it_is_replaced(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    put_pod(cluster, run, 0, "aaaaa", **RUNNING)
    evicted = {"type": "DisruptionTarget", "status": "True", "message": "Eviction API: evicting"}
    put_pod(cluster, run, 1, "bbbbb", **ended(75), conditions=[evicted])
    found = control.status(str(run))
    assert (found["state"], "evicting" in found["reason"]) == ("running", True)


def test_cancel_deletes_in_the_foreground(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    pod = put_pod(cluster, run, 0, "aaaaa", **RUNNING)
    control.cancel(str(run))
    assert control.status(str(run))["state"] == "running"
    cluster.remove("pods", pod["metadata"]["name"])
    cluster.remove("jobs", run.name)
    found = control.status(str(run))
    assert (found["state"], found["code"]) == ("cancelled", 75)
    assert cluster.objects == {}  # what the Job owned went with it


def test_a_job_that_vanished_is_lost(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    cluster.remove("jobs", run.name)
    found = control.status(str(run))
    assert (found["state"], "is gone" in found["reason"]) == ("lost", True)


def test_preempt_suspends_waits_and_resumes(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    seen = []

    def controller(method: str, plural: str, body: Any) -> None:
        if method == "PATCH" and "suspend" in body.get("spec", {}):
            seen.append((body["spec"]["suspend"], cluster.objects["jobs", run.name]["status"].get("conditions")))
            if body["spec"]["suspend"]:
                finish(cluster, run, "Suspended")

    cluster.refusal = controller
    control.preempt(str(run))
    assert [suspended for suspended, _ in seen] == [True, False]
    assert seen[1][1] == [{"type": "Suspended", "status": "True"}]


def test_a_run_is_continued_after_what_was_left_of_it_is_deleted(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    run = submit(tmp_path, site)
    finish(cluster, run, "Complete")
    first = cluster.objects["jobs", run.name]["metadata"]["uid"]
    assert control.status(str(run))["state"] == "done"
    secret = (run / "secret").read_text().strip()
    submit_job(str(run), ["train.epochs=20"], "kubernetes", site)
    assert cluster.objects["secrets", run.name]["stringData"] == {"secret": secret}
    assert cluster.objects["jobs", run.name]["metadata"]["uid"] != first
    assert "epochs: 20" in cluster.objects["configmaps", run.name]["data"]["job.yaml"]
    assert control.status(str(run))["state"] == "pending"


def test_context_and_namespace_come_from_the_site(cluster: Cluster, tmp_path: Path, site: Path) -> None:
    site.write_text("claim: runs\ncontext: elsewhere\n")
    with pytest.raises(JobError, match='context "elsewhere" does not exist'):
        submit(tmp_path, site)
    site.write_text("claim: runs\ncontext: test\nnamespace: team\n")
    run = submit(tmp_path, site)
    assert {item["metadata"]["namespace"] for item in cluster.objects.values()} == {"team"}
    assert handle_of(run)["namespace"] == "team"
