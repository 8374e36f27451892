"""The Kubernetes platform: the manifests of `k8s/`, applied and followed by kubectl."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.errors import STOPPED, JobError
from trainer.launch.kubernetes_client import KINDS, Kubectl, Refused, remedy
from trainer.launch.kubernetes_render import object_name, render_manifests
from trainer.launch.kubernetes_site import KubernetesSite, load_kubernetes_site
from trainer.launch.kubernetes_state import Pod, newest_pods, read_pod, read_state
from trainer.launch.platform import Plan, Platform, State
from trainer.record import read_json, write_json

POLL_S = 2.0
"""How old an answer of the cluster may be: who follows a run asks ten times a second."""
SELECTOR = "--selector=app.kubernetes.io/instance={name}"


class Kubernetes(Platform):
    """A cluster, reached by kubectl."""

    name = "kubernetes"

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.asked: tuple[float, State] | None = None

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
        name, kind, manifests = object_name(plan), KINDS[site.kind], self.render(plan) + "\n"
        kubectl = Kubectl(site.context, site.namespace)
        (plan.run / "exit.json").unlink(missing_ok=True)
        if (plan.run / "handle.json").exists():  # the run is continued: what was left of it would be in the way
            kubectl.demand(
                "delete", f"{kind}/{name}", f"configmap/{name}", "--ignore-not-found", "--cascade=foreground"
            )
        kubectl.demand("apply", "--filename=-", text=manifests)
        self._adopt(kubectl, kind, name)
        if site.claim is None:
            print("note: the site names no claim: this run cannot resume when its pods are replaced", file=sys.stderr)
        return {
            "context": site.context,
            "namespace": site.namespace,
            "kind": kind,
            "name": name,
            "ranks_per_node": plan.job.ranks_per_node,
        }

    def _adopt(self, kubectl: Kubectl, kind: str, name: str) -> None:
        """Let the Job own what was made for it, so that deleting it, by hand or by its TTL, leaves nothing."""
        try:
            owner = kubectl.get(f"{kind}/{name}")[0]
            reference = {
                "apiVersion": owner["apiVersion"],
                "kind": owner["kind"],
                "name": name,
                "uid": owner["metadata"]["uid"],
            }
            patch = json.dumps({"metadata": {"ownerReferences": [reference]}})
            for other in ("networkpolicy", "configmap", *(["service"] if owner["kind"] == "Job" else [])):
                kubectl.run("patch", f"{other}/{name}", "--type=merge", f"--patch={patch}")
        except Refused as error:
            print(f"note: {name}'s other objects will outlive it: {error}", file=sys.stderr)

    def state(self, run: Path, handle: dict[str, Any]) -> State:
        """By the cluster's objects; the end is kept in `exit.json`, because objects of ended jobs are removed."""
        if self.asked is not None and time.monotonic() - self.asked[0] < POLL_S:
            return self.asked[1]
        ended = read_json(run / "exit.json")
        if ended is not None:
            return State(ended["word"], ended["reason"], ended["code"])
        state = self._ask(handle)
        if state.word not in ("pending", "running", "lost"):
            write_json(run / "exit.json", asdict(state))
        self.asked = time.monotonic(), state
        return state

    def _ask(self, handle: dict[str, Any]) -> State:
        kubectl, name = _kubectl(handle), handle["name"]
        try:
            found = kubectl.get(f"{handle['kind']},pods", SELECTOR.format(name=name))
            owners = [item for item in found if item["kind"] != "Pod" and item["metadata"]["name"] == name]
            pods = [read_pod(item) for item in found if item["kind"] == "Pod"]
            if owners:
                return read_state(owners[0], pods, [] if pods else self._warnings(kubectl, name))
        except Refused as error:
            return State("lost", f"the cluster was asked and refused: {error}. {remedy(str(error))}")
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
        self.asked = None

    def preempt(self, run: Path, handle: dict[str, Any]) -> None:
        """Suspend the Job and resume it: pods that are suspended count as no failure and are replaced without delay."""
        kubectl, what = _kubectl(handle), f"{handle['kind']}/{handle['name']}"
        kubectl.demand("patch", what, "--type=merge", '--patch={"spec":{"suspend":true}}')
        kubectl.demand("wait", what, "--for=condition=Suspended", "--timeout=60s")
        kubectl.demand("patch", what, "--type=merge", '--patch={"spec":{"suspend":false}}')

    def logs(self, run: Path, handle: dict[str, Any], rank: int | None, following: bool) -> None:
        """Print what the pods printed; one rank's log from the run folder on the claim, while its pod runs.

        Raises:
            JobError: there is no pod to ask.
        """
        kubectl, name = _kubectl(handle), handle["name"]
        words = [
            "logs",
            SELECTOR.format(name=name),
            "--prefix",
            "--tail=-1",
            "--ignore-errors",
            "--max-log-requests=1000",
        ]
        if rank is not None:
            pod = newest_pods(self._pods(handle)).get(rank // handle["ranks_per_node"])
            if pod is None or pod.phase != "Running":
                raise JobError("--rank", rank, "its pod does not run", "Its log is in the run folder on the claim")
            tail = [
                "tail",
                "--lines=+1",
                *(["--follow=name"] if following else []),
                f"/runs/{run.name}/logs/rank-{rank}.log",
            ]
            words = ["exec", pod.name, "--", *tail]
        elif following:
            words.append("--follow")
        code = subprocess.run(kubectl.command(*words)).returncode
        if code:
            raise JobError("kubectl", " ".join(words), f"ended with exit code {code}", "Its own words are above")

    def _pods(self, handle: dict[str, Any]) -> list[Pod]:
        try:
            return [read_pod(item) for item in _kubectl(handle).get("pods", SELECTOR.format(name=handle["name"]))]
        except Refused as error:
            raise JobError("kubectl", "get pods", f"refused: {error}", remedy(str(error))) from None


def _kubectl(handle: dict[str, Any]) -> Kubectl:
    return Kubectl(handle["context"], handle["namespace"])
