"""The Kubernetes platform: the manifests of `k8s/`, applied and followed by kubectl."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.errors import STOPPED
from trainer.launch.kubernetes.kubectl import KINDS, Kubectl, Refused, remedy
from trainer.launch.kubernetes.logs import copy_logs
from trainer.launch.kubernetes.manifests import make_manifests, object_name, render_manifests
from trainer.launch.kubernetes.site import KubernetesSite, load_kubernetes_site
from trainer.launch.kubernetes.state import read_pod, read_state
from trainer.launch.platform import Plan, Platform, State
from trainer.records import read_json, write_json
from trainer.run.log_tail import last_lines

POLL_S = 2.0
"""How old an answer of the cluster may be: who follows a run asks ten times a second."""
SELECTOR = "--selector=app.kubernetes.io/instance={name}"


class Kubernetes(Platform):
    """A cluster, reached by kubectl."""

    name = "kubernetes"

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.asked: tuple[float, State] | None = None
        self.following = False

    def load_site(self, path: Path | None) -> dict[str, Any]:
        """Read and check `k8s/site.yaml` or the given file."""
        return asdict(load_kubernetes_site(path))

    def render(self, plan: Plan) -> str:
        """The manifests, as `kubectl apply --filename -` takes them."""
        return render_manifests(plan).rstrip("\n")

    def submit(self, plan: Plan, follow: bool) -> dict[str, Any]:
        """Apply the manifests; the Job then owns the other objects, which go when it goes.

        Raises:
            JobError: no kubectl, no cluster, or the API server refused.
        """
        site = KubernetesSite(**plan.site)
        name, kind, kubectl = object_name(plan), KINDS[site.kind], Kubectl(site.context, site.namespace)
        for stale in ("exit.json", "logs/.kubernetes.json"):
            (plan.run / stale).unlink(missing_ok=True)
        if (plan.run / "handle.json").exists():  # the run is continued: what was left of it would be in the way
            left = [f"{kind}/{name}", f"configmap/{name}"]
            kubectl.demand("delete", *left, "--ignore-not-found", "--cascade=foreground")
        kubectl.demand("apply", "--filename=-", text=self.render(plan) + "\n")
        self._adopt(kubectl, f"{kind}/{name}", make_manifests(plan)[:-1])
        if site.claim is None:
            print("note: the site names no claim: this run cannot resume when its pods are replaced", file=sys.stderr)
        self.following = follow
        return {"context": site.context, "namespace": site.namespace, "kind": kind, "name": name}

    def _adopt(self, kubectl: Kubectl, what: str, manifests: list[dict[str, Any]]) -> None:
        """Let the Job own what was made for it: deleting it, by hand or by its TTL, leaves nothing but the claim."""
        others = [item for item in manifests if item["kind"] != "PersistentVolumeClaim"]
        try:
            [owner] = kubectl.get(what)
            reference = {key: owner[key] for key in ("apiVersion", "kind")}
            reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
            patch = json.dumps({"metadata": {"ownerReferences": [reference]}})
            listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": others})
            kubectl.run("patch", "--filename=-", "--type=merge", f"--patch={patch}", text=listed)
        except Refused as error:
            print(f"note: what was made for {what} will outlive it: {error}", file=sys.stderr)

    def state(self, run: Path, handle: dict[str, Any]) -> State:
        """By the cluster's objects; what the pods print is copied to `logs/` on the way.

        The end is kept in `exit.json`, because the objects of ended jobs are removed.
        """
        if self.asked is not None and time.monotonic() - self.asked[0] < POLL_S:
            return self.asked[1]
        ended = read_json(run / "exit.json")
        if ended is not None:
            return State(**ended)
        try:
            state = self._ask(run, handle)
        except Refused as error:
            before = self.asked[1] if self.asked else State("lost")
            state = State(before.word, f"kubectl failed: {error}. {remedy(str(error))}")
        if state.word not in ("pending", "running", "lost"):
            write_json(run / "exit.json", asdict(state))
        self.asked = time.monotonic(), state
        return state

    def _ask(self, run: Path, handle: dict[str, Any]) -> State:
        """Ask the cluster.

        Raises:
            Refused: by kubectl.
        """
        kubectl, name = _kubectl(handle), handle["name"]
        selector = SELECTOR.format(name=name)
        found = kubectl.get(f"{handle['kind']},pods", selector)
        pods = [read_pod(item) for item in found if item["kind"] == "Pod"]
        lines = copy_logs(kubectl, selector, run, pods) if any(pod.started for pod in pods) else []
        if self.following:
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        owner = next((item for item in found if item["kind"] != "Pod" and item["metadata"]["name"] == name), None)
        if owner is not None:
            state = read_state(owner, pods, [] if pods else self._warnings(kubectl, name))
            return replace(state, reason=_last_step(run)) if state.word == "running" and not state.reason else state
        if handle.get("cancelled"):
            return State("cancelled", code=STOPPED)
        return State("lost", f"{handle['kind']}/{name} is gone: deleted by hand, or removed after its end")

    def _warnings(self, kubectl: Kubectl, name: str) -> list[str]:
        """What events warn of, such as an exceeded quota: the only word on pods that could not be made."""
        events = kubectl.get("events", "--field-selector=type=Warning", "--sort-by=.metadata.creationTimestamp")
        about = [item for item in events if item["involvedObject"]["name"].startswith(name)]
        return [f"{item['reason']}: {item['message']}" for item in about]

    def cancel(self, run: Path, handle: dict[str, Any]) -> None:
        """Delete the Job: its pods get SIGTERM and their grace period to save."""
        _kubectl(handle).demand("delete", f"{handle['kind']}/{handle['name']}", "--cascade=foreground", "--wait=false")
        handle["cancelled"], self.asked = True, None

    def preempt(self, run: Path, handle: dict[str, Any]) -> None:
        """Suspend the Job and resume it: pods that are suspended count as no failure and are replaced without delay."""
        kubectl, what = _kubectl(handle), f"{handle['kind']}/{handle['name']}"
        kubectl.demand("patch", what, "--type=merge", '--patch={"spec":{"suspend":true}}')
        kubectl.demand("wait", what, "--for=condition=Suspended", "--timeout=60s")
        kubectl.demand("patch", what, "--type=merge", '--patch={"spec":{"suspend":false}}')


def _last_step(run: Path) -> str:
    """The newest progress line of node 0."""
    lines = last_lines(run / "logs" / "node-0.log").splitlines()
    return next((line for line in reversed(lines) if line.startswith("step ")), "")


def _kubectl(handle: dict[str, Any]) -> Kubectl:
    return Kubectl(handle["context"], handle["namespace"])
