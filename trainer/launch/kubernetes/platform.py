"""The Kubernetes platform: the manifests of `k8s/`, applied and followed by kubectl."""

import json
import sys
from dataclasses import asdict, replace
from typing import Any

from trainer.errors import STOPPED, JobError, MaybeAccepted
from trainer.launch.kubernetes.kubectl import COPIED_UNTIL, KINDS, Kubectl, Refused, copy_logs
from trainer.launch.kubernetes.manifests import make_manifests, render_manifests
from trainer.launch.kubernetes.site import KubernetesSite
from trainer.launch.kubernetes.state import Pod, newest_pods, read_pod, read_status
from trainer.launch.platform import JobStatus, Phase, Plan, Platform
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder
from trainer.run.log_tail import last_lines

BY_TIME = "--sort-by=.metadata.creationTimestamp"
Manifests = list[dict[str, Any]]
"""What kubectl applies: the Job or JobSet comes last."""


class Kubernetes(Platform[KubernetesSite, Manifests]):
    name, folder, site_type = "kubernetes", "k8s", KubernetesSite
    ids = {"kind": "|".join(KINDS.values()), "name": "[a-z0-9]([-a-z0-9.]*[a-z0-9])?"}  # noqa: RUF012
    poll_s = 2.0
    following = False

    def build(self, plan: Plan[KubernetesSite]) -> Manifests:
        return make_manifests(plan)

    def render(self, request: Manifests) -> str:
        return render_manifests(request)

    def submit(self, plan: Plan[KubernetesSite], request: Manifests, follow: bool) -> dict[str, Any]:
        """Apply the manifests. Raises JobError: no kubectl, no cluster, or the API server refused."""
        site, name = plan.site, request[-1]["metadata"]["name"]
        handle = {"context": site.context, "namespace": site.namespace, "kind": KINDS[site.kind], "name": name}
        kubectl, text = Kubectl(handle), self.render(request) + "\n"
        for stale in (plan.run.exit, plan.run.logs / COPIED_UNTIL):
            stale.unlink(missing_ok=True)
        if plan.run.handle.exists():  # the run is continued, and what is left of it is in the way
            remains = (kubectl.workload, f"configmap/{name}")
            kubectl.run_or_raise("delete", *remains, "--ignore-not-found", "--cascade=foreground")
        kubectl.run_or_raise("apply", "--filename=-", "--dry-run=server", text=text)  # nothing is made of half a job
        try:
            kubectl.run_or_raise("apply", "--filename=-", text=text)
        except JobError as error:
            remedy = f"{error.remedy}. `kubectl get {kubectl.workload}` says whether it was made all the same"
            raise MaybeAccepted(error.key, error.value, error.problem, remedy) from None
        self._adopt(kubectl, request[:-1])
        if site.claim is None:
            note = "the site file names no claim, so this run cannot resume when its pods are replaced"
            print(f"note: {note}", file=sys.stderr)
        self.following = follow
        return handle

    def _adopt(self, kubectl: Kubectl, manifests: Manifests) -> None:
        """Let the Job own what was made for it: when it is deleted, by hand or by its TTL, only the claim remains."""
        others = [item for item in manifests if item["kind"] != "PersistentVolumeClaim"]
        try:
            [owner] = kubectl.get(kubectl.workload)
            reference = {key: owner.get(key) or owner["metadata"][key] for key in ("apiVersion", "kind", "name", "uid")}
            patch = json.dumps({"metadata": {"ownerReferences": [reference]}})
            owned = json.dumps({"apiVersion": "v1", "kind": "List", "items": others})
            kubectl.run("patch", "--filename=-", "--type=merge", f"--patch={patch}", text=owned)
        except Refused as error:
            print(f"note: the objects that were made for {kubectl.workload} will outlive it: {error}", file=sys.stderr)

    def ask(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """By the cluster's objects, or `exit.json`, which keeps the end, because objects of ended jobs are removed."""
        ended = read_json(run.exit)
        if ended is not None:  # runs of version 0.1 called the phase a word
            return JobStatus(Phase(ended.get("phase") or ended["word"]), ended["reason"], ended["code"])
        try:
            status = self._ask_cluster(run, handle)
        except Refused as error:
            return JobStatus(Phase.UNKNOWN, f"kubectl failed: {error}. {error.remedy}")
        if not status.is_active and status.phase != Phase.LOST:
            write_json(run.exit, asdict(status))
        return status

    def _ask_cluster(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """By the cluster; what the pods print is copied to `logs/` on the way. Raises Refused: by kubectl."""
        kubectl, name = Kubectl(handle), handle["name"]
        selector = f"--selector=app.kubernetes.io/instance={name}"
        objects = kubectl.get(f"{handle['kind']},pods", selector)
        pods = [read_pod(item) for item in objects if item["kind"] == "Pod"]
        lines = copy_logs(kubectl, selector, run, pods) if any(pod.started for pod in pods) else []
        if self.following:
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        owner = next((item for item in objects if item["kind"] != "Pod" and item["metadata"]["name"] == name), None)
        if owner is not None:
            status = read_status(owner, pods, self._events(kubectl, owner, pods))
            if status.phase == Phase.RUNNING and not status.reason:
                steps = [line for line in last_lines(run.node_log(0)).splitlines() if line.startswith("step ")]
                return replace(status, reason=steps[-1] if steps else "")
            return status
        if handle.get("cancelled"):
            return JobStatus(Phase.CANCELLED, code=STOPPED)
        return JobStatus(Phase.LOST, f"{kubectl.workload} is gone: it was deleted by hand, or removed after its end")

    def _events(self, kubectl: Kubectl, owner: dict[str, Any], pods: list[Pod]) -> list[dict[str, Any]]:
        """What the cluster says about the first pod that waits; or why there are none, as after an exceeded quota."""
        late = [pod.name for pod in newest_pods(pods) if pod.waiting]
        if pods and not late:
            return []
        name = late[0] if late else owner["metadata"]["name"]
        queued = "involvedObject.kind=Workload" if owner["spec"].get("suspend") else "type=Warning"
        which = f"--field-selector={f'involvedObject.name={name}' if late else queued}"
        try:
            return [item for item in kubectl.get("events", which, BY_TIME) if name in item["involvedObject"]["name"]]
        except Refused:  # who may see pods need not see events
            return []

    def cancel(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Delete the Job: its pods get SIGTERM and their grace period to save."""
        kubectl = Kubectl(handle)
        kubectl.run_or_raise("delete", kubectl.workload, "--cascade=foreground", "--wait=false")
        handle["cancelled"], self.kept = True, None

    def preempt(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Suspend the Job and resume it: suspended pods do not count as failures and are replaced without delay."""
        kubectl = Kubectl(handle)
        kubectl.run_or_raise("patch", kubectl.workload, "--type=merge", '--patch={"spec":{"suspend":true}}')
        kubectl.run_or_raise("wait", kubectl.workload, "--for=condition=Suspended", "--timeout=60s")
        kubectl.run_or_raise("patch", kubectl.workload, "--type=merge", '--patch={"spec":{"suspend":false}}')
