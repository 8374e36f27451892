"""Plays the kubelet for the cluster in memory: a pod is a container of the real engine.

Each rule names its page of kubernetes.io/docs.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

from engine import Engine
from fake_api_server import Cluster, Object, now
from fake_kubelet_container import run_words


class Kubelet:
    """Starts, watches and ends the containers of pods."""

    def __init__(self, engine: Engine, image: str, cluster: Cluster, folder: Path) -> None:
        """`folder`: where volumes lie on this machine."""
        self.engine, self.image, self.cluster, self.folder = engine, image, cluster, folder
        self.network = f"pods-{secrets.token_hex(3)}"
        self.engine.docker("network", "create", self.network)
        self.dns = threading.Event()
        """Unset: names do not resolve yet."""
        self.dns.set()
        self.stopping: dict[str, threading.Thread] = {}
        self.known: set[str] = set()
        self.steps: list[tuple[str, str]] = []
        """What containers before the agent printed, with the names of their pods."""
        cluster.read_log, cluster.execute = self.read_log, self.execute

    def _start(self, pod: Object) -> None:
        """Schedule a pod and run its container, unless its claim is missing (concepts/storage/persistent-volumes)."""
        for volume in pod["spec"]["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("persistentvolumeclaims", claim) not in self.cluster.objects:
                message = f'0/1 nodes are available: persistentvolumeclaim "{claim}" not found.'
                condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
                return self._status(pod, phase="Pending", conditions=[condition])
        for step in pod["spec"].get("initContainers", []):
            if not self._ran(pod, step):
                return None
        (container,) = pod["spec"]["containers"]
        words = run_words(pod, container, self.cluster, self.folder, self.image)
        names = []
        if self.dns.is_set() and "subdomain" in pod["spec"]:
            names = [f"--network-alias={pod['spec']['hostname']}.{pod['spec']['subdomain']}"]
        name = f"--name={pod['metadata']['name']}"
        self.engine.docker("run", "--detach", f"--network={self.network}", name, *names, *words)
        self.known.add(pod["metadata"]["name"])
        ready = {"type": "Ready", "status": "True"}
        return self._status(pod, phase="Running", conditions=[ready], containerStatuses=[
            {"name": "agent", "state": {"running": {"startedAt": now()}}}])  # fmt: skip

    def _ran(self, pod: Object, step: Object) -> bool:
        """Run a container to its end before the others; its failure is the pod's (concepts/workloads/pods/
        init-containers).
        """
        words = run_words(pod, step, self.cluster, self.folder, self.image)
        done = self.engine.docker("run", "--rm", "--network=none", *words, check=False)
        code, printed = done.returncode, (done.stdout + done.stderr)[-2048:]
        state = {"terminated": {"exitCode": code, "message": printed if code else "", "finishedAt": now()}}
        waits = {"waiting": {"reason": "PodInitializing"}}
        self._status(pod, phase="Failed" if code else "Pending", containerStatuses=[{"name": "agent", "state": waits}],
                     initContainerStatuses=[{"name": step["name"], "state": state}])  # fmt: skip
        self.steps.append((pod["metadata"]["name"], done.stdout))
        if code:
            self.ended_pod(pod, code)
        return not code

    def publish_names(self) -> None:
        """Let the pods' names resolve from now on ("Pod's hostname and subdomain fields" in
        concepts/services-networking/dns-pod-service): on a second network, because the engine's names come with one.
        """
        self.dns.set()
        late = f"{self.network}-named"
        self.engine.docker("network", "create", late)
        for pod in [pod for pod in self.cluster.select("pods", {}) if pod["status"]["phase"] == "Running"]:
            alias = f"{pod['spec']['hostname']}.{pod['spec']['subdomain']}"
            self.engine.docker("network", "connect", f"--alias={alias}", late, pod["metadata"]["name"])

    def _status(self, pod: Object, **status: Any) -> None:
        with self.cluster.change:
            pod["status"] = {**pod["status"], **status}
            self.cluster.changed(pod)

    def evict(self, pod: Object) -> None:
        """What the Eviction API does: a condition, SIGTERM, the grace period (concepts/workloads/pods/disruptions)."""
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
                     "message": "Eviction API: evicting"}  # fmt: skip
        self._status(pod, conditions=[*pod["status"].get("conditions", []), condition])
        self.stop(pod)

    def kill(self, pod: Object) -> None:
        """End the container's processes at once, as the kernel does for memory ("How Kubernetes applies resource
        requests and limits" in concepts/configuration/manage-resources-containers), or a power loss.
        """
        self.engine.docker("kill", "--signal=KILL", pod["metadata"]["name"])

    def stop(self, pod: Object) -> None:
        """SIGTERM, and SIGKILL after terminationGracePeriodSeconds (concepts/workloads/pods/pod-lifecycle)."""
        name = pod["metadata"]["name"]
        if name not in self.known:
            self.cluster.remove("pods", name)
        elif name not in self.stopping:
            words = ("stop", f"--time={pod['spec']['terminationGracePeriodSeconds']}", name)
            self.stopping[name] = threading.Thread(target=lambda: self.engine.docker(*words, check=False))
            self.stopping[name].start()

    def _read_containers(self) -> None:
        """Bring the pods' status up to date with their containers."""
        exited = self.engine.docker("ps", "--all", "--filter=status=exited", "--format={{.Names}}").stdout.split()
        for pod in self.cluster.select("pods", {}):
            if pod["status"]["phase"] == "Running" and pod["metadata"]["name"] in exited:
                self._finish(pod)

    def _finish(self, pod: Object) -> None:
        """A container ended: phase, exit code and last word (concepts/workloads/pods/pod-lifecycle and, for the word,
        tasks/debug/debug-application/determine-reason-pod-failure).
        """
        state = self.engine.inspect(pod["metadata"]["name"])["State"]
        code = state["ExitCode"]
        message = (self.folder / "pods" / pod["metadata"]["name"] / "termination-log-agent").read_text()
        if code and not message:  # terminationMessagePolicy: FallbackToLogsOnError
            printed = self.engine.docker("logs", "--tail=80", pod["metadata"]["name"])
            message = (printed.stdout + printed.stderr)[-2048:]
        reason = "OOMKilled" if state["OOMKilled"] else "Error" if code else "Completed"
        ended = {"exitCode": code, "reason": reason, "message": message[:4096], "finishedAt": state["FinishedAt"]}
        phase = "Failed" if code else "Succeeded"
        self._status(pod, phase=phase, containerStatuses=[{"name": "agent", "state": {"terminated": ended}}])
        self.ended_pod(pod, code)

    def ended_pod(self, pod: Object, code: int) -> None:
        """For the pod's owner to decide what its end means."""

    def read_log(self, name: str, timestamps: bool, since: str) -> str:
        """What `kubectl logs` gets (concepts/cluster-administration/logging)."""
        words = [*(["--timestamps"] if timestamps else []), *([f"--since={since}"] if since else [])]
        done = self.engine.docker("logs", *words, name, check=False)
        lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
        return "".join(f"{line}\n" for line in (sorted(lines) if timestamps else lines))

    def execute(self, pod: str, container: str, argv: list[str]) -> subprocess.Popen[bytes]:
        """What `kubectl exec` starts (tasks/debug/debug-application/get-shell-running-container)."""
        assert container == "agent", "a pod is one container here, apart from those that have ended"
        words, pipe = ["docker", "exec", "--interactive", pod, *argv], subprocess.PIPE
        return subprocess.Popen(words, env=self.engine.env, stdin=pipe, stdout=pipe, stderr=pipe)

    def make_claim(self, name: str) -> Path:
        """A bound claim (concepts/storage/persistent-volumes); returns its folder on this machine."""
        self.cluster.put("persistentvolumeclaims", {"metadata": {"name": name}, "status": {"phase": "Bound"}})
        folder = self.folder / "claims" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder
