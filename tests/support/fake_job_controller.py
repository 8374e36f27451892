"""Plays the Job controller for the cluster in memory, over the kubelet that makes its pods real containers.

Only what Kubernetes documents is modelled, and only what our manifests use; each rule names its page of
kubernetes.io/docs. Time is not: the back-off of 10 s, doubling ("Pod backoff failure policy" in
concepts/workloads/controllers/job), is one second here.
"""

from __future__ import annotations

import copy
import secrets
import threading
import time
from pathlib import Path

from engine import Engine
from fake_api_server import Cluster, Object, now
from fake_kubelet import Kubelet

INDEX = "batch.kubernetes.io/job-completion-index"
BACKOFF_S = 1.0
TICK_S = 0.2


class Pods(Kubelet):
    """Runs the pods of all Jobs until it is closed."""

    def __init__(self, engine: Engine, image: str, cluster: Cluster, folder: Path) -> None:
        """`folder`: where volumes lie on this machine."""
        super().__init__(engine, image, cluster, folder)
        self.hold = False
        """Set: no pod is made, as when no node has room."""
        self.failed: dict[str, int] = {}
        """Pods of each Job that count against its backoffLimit."""
        self.not_before: dict[str, float] = {}
        self.ended = threading.Event()
        self.trouble: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def close(self) -> None:
        """Stop playing; raise what went wrong meanwhile."""
        self.ended.set()
        self.thread.join()
        for thread in self.stopping.values():
            thread.join()
        if self.trouble:
            raise self.trouble

    def _run(self) -> None:
        try:
            while not self.ended.wait(TICK_S):
                with self.cluster.change:
                    jobs = self.cluster.select("jobs", {})
                self._read_containers()
                for job in jobs:
                    self._sync(job)
                for pod in self.cluster.select("pods", {}):
                    if "ownerReferences" not in pod["metadata"]:
                        self._sync_pod(pod)
        except BaseException as error:
            self.trouble = error

    def pods_of(self, job: Object, *phases: str) -> list[Object]:
        """The pods that a Job owns, in the given phases or all."""
        with self.cluster.change:
            pods = self.cluster.select(
                "pods", {"labelSelector": f"batch.kubernetes.io/controller-uid={job['metadata']['uid']}"}
            )
        return [pod for pod in pods if not phases or pod["status"]["phase"] in phases]

    def pod(self, node: int) -> Object:
        """The newest pod of that index, once it runs."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with self.cluster.change:
                pods = [
                    pod for pod in self.cluster.select("pods", {}) if pod["metadata"]["annotations"][INDEX] == str(node)
                ]
            running = [pod for pod in pods if pod["status"]["phase"] == "Running"]
            if running:
                return running[-1]
            time.sleep(0.05)
        raise AssertionError(f"no pod of index {node} runs: {pods}")

    def _sync(self, job: Object) -> None:
        """One look at a Job: its completions, suspension, backoffLimit (concepts/workloads/controllers/job)."""
        name, spec = job["metadata"]["name"], job["spec"]
        active = self.pods_of(job, "Pending", "Running")
        conditions = {each["type"] for each in job["status"].get("conditions", []) if each["status"] == "True"}
        if conditions & {"Complete", "Failed"}:
            return None
        if job["metadata"].get("deletionTimestamp") or "FailureTarget" in conditions or spec.get("suspend"):
            for pod in active:
                self.stop(pod)
            if spec.get("suspend"):  # "suspending a Job": its pods are deleted, and count as nothing
                self._condition(job, "Suspended", True, "JobSuspended")
            elif active:
                return None
            elif job["metadata"].get("deletionTimestamp"):  # foreground cascading deletion: after the dependents
                self.cluster.remove("jobs", name)
            else:
                [target] = [each for each in job["status"]["conditions"] if each["type"] == "FailureTarget"]
                self._condition(job, "Failed", True, target["reason"], target["message"])
            return None
        self._condition(job, "Suspended", False, "JobResumed")
        done = {pod["metadata"]["annotations"][INDEX] for pod in self.pods_of(job, "Succeeded")}
        if len(done) == spec["completions"]:
            return self._condition(job, "Complete", True, "CompletionsReached")
        if self.failed.get(job["metadata"]["uid"], 0) > spec["backoffLimit"]:
            return self._condition(
                job, "FailureTarget", True, "BackoffLimitExceeded", "Job has reached the backoff limit"
            )
        taken = done | {pod["metadata"]["annotations"][INDEX] for pod in active}
        if not self.hold:
            for index in range(spec["completions"]):
                if str(index) not in taken and time.monotonic() >= self.not_before.get(f"{name}-{index}", 0):
                    self._create(job, index)
        for pod in active:
            if pod["status"]["phase"] == "Pending" and pod["metadata"]["name"] not in self.known:
                self._start(pod)
            elif pod["metadata"].get("deletionTimestamp"):
                self.stop(pod)
        return None

    def _sync_pod(self, pod: Object) -> None:
        """A pod that no Job made is started once, and never replaced."""
        if pod["status"]["phase"] == "Pending" and pod["metadata"]["name"] not in self.known:
            self._start(pod)
        elif pod["metadata"].get("deletionTimestamp"):
            self.stop(pod)

    def _condition(self, job: Object, kind: str, status: bool, reason: str, message: str = "") -> None:
        """Set a condition: FailureTarget before the pods end, Failed after ("Terminal Job conditions" in
        concepts/workloads/controllers/job).
        """
        with self.cluster.change:
            found = [each for each in job["status"].get("conditions", []) if each["type"] == kind]
            if (not found and not status) or (found and found[0]["status"] == str(status)):
                return
            others = [each for each in job["status"].get("conditions", []) if each["type"] != kind]
            value = {
                "type": kind,
                "status": str(status),
                "reason": reason,
                "message": message,
                "lastTransitionTime": now(),
            }
            job["status"]["conditions"] = [*others, value]
            self.cluster.changed(job)

    def _create(self, job: Object, index: int) -> None:
        """A pod from the template, with what the Job controller adds: labels, annotation, host name, variable
        ("Completion mode" in concepts/workloads/controllers/job).
        """
        name, uid, template = (
            job["metadata"]["name"],
            job["metadata"]["uid"],
            copy.deepcopy(job["spec"]["template"]),
        )
        labels = {"batch.kubernetes.io/controller-uid": uid, "batch.kubernetes.io/job-name": name, INDEX: str(index)}
        template["spec"]["hostname"] = f"{name}-{index}"
        for container in template["spec"]["containers"]:
            container["env"].append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "controller": True}
        metadata = {
            "name": f"{name}-{index}-{secrets.token_hex(3)[:5]}", "ownerReferences": [owner],
            "labels": {**template["metadata"]["labels"], **labels},
            "annotations": {**template["metadata"].get("annotations", {}), INDEX: str(index)},
        }  # fmt: skip
        self.cluster.put("pods", {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}})

    def ended_pod(self, pod: Object, code: int) -> None:
        """Its failure delays the next pod and meets the policy; a pod that was to be deleted is."""
        if "ownerReferences" not in pod["metadata"]:
            if pod["metadata"].get("deletionTimestamp"):  # another may get its name
                name = pod["metadata"]["name"]
                self.engine.docker("rm", "--force", name)
                self.known.discard(name)
                self.stopping.pop(name, None)
                self.cluster.remove("pods", name)
            return
        owner = self.cluster.objects.get(("jobs", pod["metadata"]["ownerReferences"][0]["name"]))
        if owner is not None and not owner["spec"].get("suspend"):
            if code:
                self._delay(owner, pod["metadata"]["annotations"][INDEX])
                self._decide(owner, pod, code)
            if pod["metadata"].get("deletionTimestamp"):
                self.cluster.remove("pods", pod["metadata"]["name"])
        elif owner is not None:
            self.cluster.remove("pods", pod["metadata"]["name"])

    def _delay(self, job: Object, index: str) -> None:
        """The next pod of an index waits for itself, with backoffLimitPerIndex; else all wait ("Backoff limit per
        index" in concepts/workloads/controllers/job).
        """
        own = "backoffLimitPerIndex" in job["spec"]
        for each in [index] if own else map(str, range(job["spec"]["completions"])):
            self.not_before[f"{job['metadata']['name']}-{each}"] = time.monotonic() + BACKOFF_S

    def _decide(self, job: Object, pod: Object, code: int) -> None:
        """The first rule of podFailurePolicy that matches (tasks/job/pod-failure-policy)."""
        conditions = {each["type"] for each in pod["status"].get("conditions", []) if each["status"] == "True"}
        steps = [each["state"]["terminated"]["exitCode"] for each in pod["status"].get("initContainerStatuses", [])]
        container = "code" if any(steps) else "agent"
        for index, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
            codes = rule.get("onExitCodes")
            if codes:  # without a name it is about all containers, those before the agent too
                matches = code in codes["values"] and codes.get("containerName", container) == container
            else:
                matches = bool(conditions & {each["type"] for each in rule["onPodConditions"]})
            if matches and rule["action"] == "FailJob":
                message = f"Container {container} for pod failed with exit code {code} matching FailJob rule at index "
                message += str(index)
                return self._condition(job, "FailureTarget", True, "PodFailurePolicy", message)
            if matches:
                return None
        uid = job["metadata"]["uid"]
        self.failed[uid] = self.failed.get(uid, 0) + 1
        return None
