"""The Kubernetes platform: the manifests of `k8s/`, applied and followed by kubectl."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.errors import STOPPED
from trainer.launch.kubernetes.kubectl import KINDS, Kubectl, Refused, remedy_for
from trainer.launch.kubernetes.logs import copied_until, copy_logs
from trainer.launch.kubernetes.manifests import make_manifests, object_name, render_manifests
from trainer.launch.kubernetes.site import KubernetesSite, load_kubernetes_site
from trainer.launch.kubernetes.state import read_pod, read_status
from trainer.launch.platform import JobStatus, Phase, Plan, Platform
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder
from trainer.run.log_tail import last_lines

POLL_S = 2.0
"""For how long an answer of the cluster is used again: following a run asks ten times a second."""
SELECTOR = "--selector=app.kubernetes.io/instance={name}"


@dataclass(frozen=True)
class KubernetesRequest:
    """What kubectl applies: the Job or JobSet is the last of the manifests."""

    name: str
    """Of the Job or JobSet."""
    manifests: list[dict[str, Any]]


class Kubernetes(Platform[KubernetesSite, KubernetesRequest]):
    """A cluster, reached by kubectl."""

    name = "kubernetes"

    def __init__(self) -> None:
        """No answer is kept yet."""
        self.kept: tuple[float, JobStatus] | None = None
        self.following = False

    def load_site(self, path: Path | None) -> KubernetesSite:
        """Read and check `k8s/site.yaml` or the given file."""
        return load_kubernetes_site(path)

    def build(self, plan: Plan[KubernetesSite]) -> KubernetesRequest:
        """The manifests."""
        return KubernetesRequest(object_name(plan), make_manifests(plan))

    def render(self, request: KubernetesRequest) -> str:
        """The manifests, as `kubectl apply --filename -` takes them."""
        return render_manifests(request.manifests)

    def submit(self, plan: Plan[KubernetesSite], request: KubernetesRequest, follow: bool) -> dict[str, Any]:
        """Apply the manifests; the Job then owns the other objects, which are deleted with it.

        Raises:
            JobError: no kubectl, no cluster, or the API server refused.
        """
        site, kubectl = plan.site, Kubectl(plan.site.context, plan.site.namespace)
        kind, text = KINDS[site.kind], self.render(request) + "\n"
        what = f"{kind}/{request.name}"
        for stale in (plan.run.exit, copied_until(plan.run)):
            stale.unlink(missing_ok=True)
        if plan.run.handle.exists():  # the run is continued, and what is left of it is in the way
            kubectl.run_or_raise(
                "delete", what, f"configmap/{request.name}", "--ignore-not-found", "--cascade=foreground"
            )
        kubectl.run_or_raise("apply", "--filename=-", "--dry-run=server", text=text)  # nothing is made of half a job
        kubectl.run_or_raise("apply", "--filename=-", text=text)
        self._adopt(kubectl, what, request.manifests[:-1])
        if site.claim is None:
            print(
                "note: the site file names no claim, so this run cannot resume when its pods are replaced",
                file=sys.stderr,
            )
        self.following = follow
        return {"context": site.context, "namespace": site.namespace, "kind": kind, "name": request.name}

    def _adopt(self, kubectl: Kubectl, what: str, manifests: list[dict[str, Any]]) -> None:
        """Let the Job own what was made for it: when it is deleted, by hand or by its TTL, only the claim remains."""
        others = [item for item in manifests if item["kind"] != "PersistentVolumeClaim"]
        try:
            [owner] = kubectl.get(what)
            reference = {key: owner[key] for key in ("apiVersion", "kind")}
            reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
            patch = json.dumps({"metadata": {"ownerReferences": [reference]}})
            owned = json.dumps({"apiVersion": "v1", "kind": "List", "items": others})
            kubectl.run("patch", "--filename=-", "--type=merge", f"--patch={patch}", text=owned)
        except Refused as error:
            print(f"note: the objects that were made for {what} will outlive it: {error}", file=sys.stderr)

    def status(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """By the cluster's objects; what the pods print is copied to `logs/` on the way.

        The end is kept in `exit.json`, because the objects of ended jobs are removed.
        """
        if self.kept is not None and time.monotonic() - self.kept[0] < POLL_S:
            return self.kept[1]
        ended = read_json(run.exit)
        if ended is not None:  # runs of version 0.1 called the phase a word
            return JobStatus(Phase(ended.get("phase") or ended["word"]), ended["reason"], ended["code"])
        try:
            status = self._ask(run, handle)
        except Refused as error:
            phase = self.kept[1].phase if self.kept else Phase.LOST
            status = JobStatus(phase, f"kubectl failed: {error}. {remedy_for(str(error))}")
        if not status.is_active and status.phase != Phase.LOST:
            write_json(run.exit, asdict(status))
        self.kept = time.monotonic(), status
        return status

    def _ask(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        """Ask the cluster.

        Raises:
            Refused: by kubectl.
        """
        kubectl, name = _kubectl(handle), handle["name"]
        selector = SELECTOR.format(name=name)
        objects = kubectl.get(f"{handle['kind']},pods", selector)
        pods = [read_pod(item) for item in objects if item["kind"] == "Pod"]
        lines = copy_logs(kubectl, selector, run, pods) if any(pod.started for pod in pods) else []
        if self.following:
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        owner = next((item for item in objects if item["kind"] != "Pod" and item["metadata"]["name"] == name), None)
        if owner is not None:
            status = read_status(owner, pods, [] if pods else self._warnings(kubectl, name))
            quiet = status.phase == Phase.RUNNING and not status.reason
            return replace(status, reason=_last_step(run)) if quiet else status
        if handle.get("cancelled"):
            return JobStatus(Phase.CANCELLED, code=STOPPED)
        return JobStatus(
            Phase.LOST, f"{handle['kind']}/{name} is gone: it was deleted by hand, or removed after its end"
        )

    def _warnings(self, kubectl: Kubectl, name: str) -> list[str]:
        """What events warn of, such as an exceeded quota: nothing else tells why pods could not be created."""
        events = kubectl.get("events", "--field-selector=type=Warning", "--sort-by=.metadata.creationTimestamp")
        about = [item for item in events if item["involvedObject"]["name"].startswith(name)]
        return [f"{item['reason']}: {item['message']}" for item in about]

    def cancel(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Delete the Job: its pods get SIGTERM and their grace period to save."""
        what = f"{handle['kind']}/{handle['name']}"
        _kubectl(handle).run_or_raise("delete", what, "--cascade=foreground", "--wait=false")
        handle["cancelled"], self.kept = True, None

    def preempt(self, run: RunFolder, handle: dict[str, Any]) -> None:
        """Suspend the Job and resume it: suspended pods do not count as failures and are replaced without delay."""
        kubectl, what = _kubectl(handle), f"{handle['kind']}/{handle['name']}"
        kubectl.run_or_raise("patch", what, "--type=merge", '--patch={"spec":{"suspend":true}}')
        kubectl.run_or_raise("wait", what, "--for=condition=Suspended", "--timeout=60s")
        kubectl.run_or_raise("patch", what, "--type=merge", '--patch={"spec":{"suspend":false}}')


def _last_step(run: RunFolder) -> str:
    """The newest progress line of node 0."""
    lines = last_lines(run.node_log(0)).splitlines()
    return next((line for line in reversed(lines) if line.startswith("step ")), "")


def _kubectl(handle: dict[str, Any]) -> Kubectl:
    return Kubectl(handle["context"], handle["namespace"])
