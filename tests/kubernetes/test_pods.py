"""A job's manifests as real containers: training, faults and their ends, seen through muster and kubectl.

The containers run docker/Dockerfile's image with what the manifests say and nothing else; pods.py plays the cluster.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pod_runs import JOB, STEPS, WAIT_S, Runs
from stopwatch import Stopwatch

from trainer.launch import control
from trainer.launch.submit import render_job, run_job
from trainer.records import read_json
from trainer.run.folder import RunFolder

pytestmark = pytest.mark.timeout(600)  # the first test of a session may have to build the image


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, dict[int, float]]:
    """The losses of the first test's runs, by which the others are measured: by devices of a pod, and step."""
    return {}


@pytest.mark.parametrize("devices", [1, 2], ids=["2x1", "2x2"])
def test_two_pods_train_and_muster_run_follows(runs: Runs, undisturbed: Any, capfd: Any, devices: int) -> None:
    words = [*JOB, f"devices_per_node={devices}", f"runs={runs.folder / 'runs'}"]
    assert run_job("jobs/digits.yaml", words, "kubernetes", runs.site) == 0
    printed = capfd.readouterr().out
    assert f"step {STEPS}/{STEPS}" in printed
    (run,) = (runs.folder / "runs").glob("*-*")
    found = control.status(str(run))
    assert found["state"] == "done"
    assert "accuracy" in found["reason"]
    losses = runs.losses(run)
    assert sorted(losses) == list(range(1, STEPS + 1))
    undisturbed[devices] = losses
    assert (runs.claim / run.name / "result.json").stat().st_uid == 10001
    assert read_json(runs.claim / run.name / "result.json")["world_size"] == 2 * devices
    wired = runs.events(run, "wired")
    assert sorted(event["node"] for event in wired) == [0, 1]
    assert {event["master"] for event in wired} == {f"{run.name}-0.{run.name}"}


@pytest.mark.parametrize(("node", "devices"), [(1, 2), (0, 1)], ids=["other of 2x2", "master of 2x1"])
def test_a_killed_pod_is_replaced_and_the_run_resumes_exactly(
    runs: Runs, undisturbed: Any, node: int, devices: int
) -> None:
    run = runs.submit(devices=devices)
    runs.checkpoint(run, 2)
    killed = runs.pods.pod(node)
    survivor = runs.pods.pod(1 - node)
    runs.pods.kill(killed)
    assert runs.wait(run, "done", "failed")["state"] == "done", runs.printed(run)
    assert runs.events(run, "resume")[0]["step"] >= 20
    names = {pod["metadata"]["name"]: pod["status"] for pod in runs.pods.cluster.select("pods", {})}
    assert names[killed["metadata"]["name"]]["phase"] == "Failed"
    assert names[survivor["metadata"]["name"]]["phase"] == "Succeeded"  # it waited, and was not replaced
    assert runs.losses(run) == undisturbed[devices]


@pytest.mark.parametrize("node", [1, 0], ids=["other", "master"])
def test_an_evicted_pod_saves_and_the_others_wait_for_it(runs: Runs, undisturbed: Any, node: int) -> None:
    """One pod ends, and so one is replaced: the pause before that doubles with each."""
    run = runs.submit()
    runs.until(run, lambda: runs.events(run, "first_step"))
    survivor = runs.pods.pod(1 - node)["metadata"]["name"]
    runs.pods.evict(runs.pods.pod(node))
    assert runs.wait(run, "done", "failed")["state"] == "done", runs.printed(run)
    assert runs.pods.failed == {}  # nothing counted against backoffLimit
    ends = {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
            for pod in runs.pods.cluster.select("pods", {})}  # fmt: skip
    assert sorted(ends.values()) == [0, 0, 75]
    assert ends[survivor] == 0
    assert runs.events(run, "failure") == []
    assert runs.losses(run) == undisturbed[1]


def test_preempt_and_cancel(runs: Runs) -> None:
    run = runs.submit("train.steps=100000")
    runs.checkpoint(run, 1)
    before = runs.pods.pod(0)["metadata"]["name"]
    control.preempt(str(run))
    runs.until(run, lambda: runs.events(run, "resume"))
    assert runs.pods.pod(0)["metadata"]["name"] != before
    saved = len(runs.events(run, "checkpoint"))
    control.cancel(str(run))
    assert runs.wait(run, "cancelled", "failed", "lost")["state"] == "cancelled"
    assert len(runs.events(run, "checkpoint")) > saved
    assert [key for key in runs.pods.cluster.objects if key[0] not in ("pods", "persistentvolumeclaims")] == []


def test_a_wrong_job_fails_once_and_says_why(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The submitting machine has a module that the image lacks."""
    (tmp_path / "only_here.py").write_text("class Task:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = runs.submit("task=only_here:Task")
    found = runs.wait(run, "failed", "done")
    assert (found["state"], found["code"]) == ("failed", 64)
    assert "only_here" in found["reason"]
    assert len(runs.pods.cluster.select("pods", {})) == 2


def test_by_hand_a_job_that_differs_from_the_one_before_is_refused(runs: Runs) -> None:
    """It would end at once, with the old result: by hand, the run folder on the claim is that of the job's name."""
    words = [*JOB, "devices_per_node=1", "name=by-hand"]
    documents = [render_job("jobs/digits.yaml", [*words, *more], "kubernetes", runs.site)
                 for more in ([], ["train.lr=0.5"])]  # fmt: skip
    (config,) = (item for item in yaml.safe_load_all(documents[0]) if item["kind"] == "ConfigMap")
    old = RunFolder(runs.claim / "by-hand")
    old.path.mkdir()
    old.job.write_text(config["data"]["job.yaml"])
    old.path.chmod(0o777)
    subprocess.run(["kubectl", "apply", "--filename=-"], input=documents[1], text=True, check=True, capture_output=True)
    job = runs.pods.cluster.objects["jobs", "by-hand"]
    end = time.monotonic() + WAIT_S
    while not any(each["type"] == "Failed" for each in job["status"].get("conditions", [])):
        assert time.monotonic() < end, job["status"]
        time.sleep(0.1)
    ends = [pod["status"]["containerStatuses"][0]["state"]["terminated"]
            for pod in runs.pods.cluster.select("pods", {})]  # fmt: skip
    (refused, *_) = [found for found in ends if found["exitCode"] == 64]
    assert "train.lr=0.5: the run in /runs/by-hand was made with" in refused["message"]
    assert "name=..." in refused["message"]


def test_names_that_resolve_late_are_waited_for(runs: Runs) -> None:
    runs.pods.dns.clear()
    run = runs.submit("train.steps=20")
    waiting = runs.pods.pod(1)["metadata"]["name"]
    runs.until(run, lambda: "does not resolve" in runs.pods.read_log(waiting, False, ""))
    assert runs.events(run, "training") == []
    runs.pods.publish_names()
    assert runs.wait(run, "done", "failed")["state"] == "done", runs.printed(run)


def test_a_replacement_that_does_not_come_frees_the_others_and_is_waited_for(runs: Runs, stopwatch: Stopwatch) -> None:
    """Where a node dies for good, that may take longer than the other pods should hold what they have."""
    run = runs.submit("train.steps=300", "agent.rejoin_timeout_s=5")
    runs.checkpoint(run, 1)
    runs.pods.hold = True
    survivor = runs.pods.pod(0)["metadata"]["name"]
    runs.pods.kill(runs.pods.pod(1))
    with stopwatch.at_most(60):
        runs.until(run, lambda: runs.pods.cluster.objects["pods", survivor]["status"]["phase"] == "Failed")
    found = control.status(str(run))
    assert found["state"] == "pending", found
    assert f"node 1 ({run.name}-1.{run.name}) did not come within 5 s" in runs.events(run, "ended")[-1]["reason"]
    runs.pods.hold = False
    assert runs.wait(run, "done", "failed")["state"] == "done", runs.printed(run)


def test_with_kubectl_alone_the_uid_of_the_job_is_their_secret(runs: Runs, kubectl: str) -> None:
    words = [*JOB, "devices_per_node=1", "train.steps=20"]
    manifests = render_job("jobs/digits.yaml", words, "kubernetes", runs.site)
    subprocess.run([kubectl, "apply", "--filename=-"], input=manifests, text=True, check=True)
    cluster = runs.pods.cluster
    job = runs.until(runs.folder, lambda: cluster.objects.get(("jobs", "digits")))
    runs.until(runs.folder, lambda: "conditions" in job["status"])
    pods = cluster.select("pods", {})
    printed = [runs.pods.read_log(pod["metadata"]["name"], False, "") for pod in pods]
    assert [pod["status"]["phase"] for pod in pods] == ["Succeeded"] * 2, printed
    assert not list(runs.claim.rglob("secret")) and "secrets" not in [kind for kind, _ in cluster.objects]


def test_a_missing_claim_is_named_and_waited_for(runs: Runs) -> None:
    runs.site.write_text("claim: elsewhere\n")
    run = runs.submit("train.steps=20")
    runs.until(run, lambda: 'persistentvolumeclaim "elsewhere" not found' in control.status(str(run))["reason"])
    runs.claim = runs.pods.make_claim("elsewhere")
    assert runs.wait(run, "done", "failed")["state"] == "done", runs.printed(run)


def test_without_a_claim_it_trains_and_prints_all(runs: Runs) -> None:
    runs.site.write_text("")
    run = runs.submit("train.steps=20")
    found = runs.wait(run, "done", "failed")
    assert found["state"] == "done", runs.printed(run)
    assert "accuracy" in found["reason"]
    for node in (0, 1):
        assert "the run folder goes with this node" in (run / f"logs/node-{node}.log").read_text()
    assert json.loads((run / "exit.json").read_text())["code"] == 0
