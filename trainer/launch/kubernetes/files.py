"""Files on a run's claim: reached through a pod of the run, or a short-lived one that may do no more than that."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import JobError
from trainer.launch.far_folder import FarFolder
from trainer.launch.kubernetes.code import Code
from trainer.launch.kubernetes.kubectl import Kubectl, Refused, Unanswered
from trainer.launch.kubernetes.manifests import INSTANCE
from trainer.launch.kubernetes.state import Pod, newest_pods, read_pod
from trainer.launch.kubernetes.waits import explain_wait
from trainer.run.folder import RunFolder

LIFE_S = 3600
"""How long a pod for files lives if nobody removes it."""
START_S = 300
"""How long it may take to start: its image may have to be pulled."""
RESOURCES = {"cpu": "500m", "memory": "512Mi"}
KEPT = (
    "automountServiceAccountToken", "enableServiceLinks", "imagePullSecrets", "nodeSelector", "priorityClassName",
    "runtimeClassName", "securityContext", "tolerations",
)  # fmt: skip
"""What such a pod has of the run's own."""


def bring_code(kubectl: Kubectl, workload: dict[str, Any], archive: Path, code: Code) -> None:
    """Bring code to the run folder on the claim, as a whole or not at all. Raises JobError: it did not arrive."""
    with _pod(kubectl, workload) as command:
        give(FarFolder(str(archive.parent), command), code)


def give(there: FarFolder, code: Code) -> None:
    """Give a run folder its code, if it lacks that. Raises JobError: it cannot be written there, or was cut off."""
    with there.start("take", str(len(code.packed)), code.packed_sha256) as talk:
        while "end" not in (answer := talk.line()):
            if "error" in answer:
                problem = f"the code cannot be brought to the claim: {answer['error']}"
                raise JobError("claim", there.folder, problem, "Correct that, or leave data out of the code")
            if answer.get("wanted"):
                talk.send(code.packed)


@contextlib.contextmanager
def reach(kubectl: Kubectl, run: RunFolder, name: str) -> Iterator[FarFolder]:
    """The run folder on the claim, through a pod of the run if one runs. Raises JobError: there is no claim."""
    folder = f"/runs/{run.name}"
    if pods := running_pods(kubectl, name):
        yield FarFolder(folder, _command(kubectl, pods[0].name))
        return
    try:
        *_, workload = yaml.safe_load_all((run.plan / "kubernetes.txt").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        remedy = "Copy them by hand, with `kubectl cp` and a pod that mounts the claim"
        raise JobError("RUN", str(run), "what was submitted is not known any more", remedy) from None
    with _pod(kubectl, workload) as command:
        yield FarFolder(folder, command)


def running_pods(kubectl: Kubectl, name: str) -> list[Pod]:
    """The pods of a run in which a command can be run; none for who may not see them, and may yet make others."""
    try:
        items = kubectl.get("pods", f"--selector={INSTANCE}={name}")
    except (Refused, Unanswered):
        return []
    return [pod for pod in newest_pods([read_pod(item) for item in items]) if pod.lives and pod.started]


def _command(kubectl: Kubectl, pod: str) -> Any:
    return lambda words: [*kubectl.command, "exec", "--stdin", pod, "--container=agent", "--", *words]


@contextlib.contextmanager
def _pod(kubectl: Kubectl, workload: dict[str, Any]) -> Iterator[Any]:
    """A pod that has the claim, as long as it is needed. Raises JobError: it is refused, or does not start."""
    manifest = pod_for_files(workload)
    name, which = manifest["metadata"]["name"], f"pod/{manifest['metadata']['name']}"
    kubectl.run_or_raise("delete", which, "--ignore-not-found", "--now")  # of a try that was killed
    kubectl.run_or_raise("create", "--filename=-", text=json.dumps(manifest))
    try:
        try:
            kubectl.run("wait", which, "--for=condition=Ready", f"--timeout={START_S}s", timeout_s=START_S + 30)
        except (Refused, Unanswered) as error:
            raise JobError("claim", name, _why_not(kubectl, which, error), "Correct that, and try again") from None
        yield _command(kubectl, name)
    finally:
        with contextlib.suppress(JobError, Refused):
            kubectl.run("delete", which, "--ignore-not-found", "--now", "--wait=false")


def _why_not(kubectl: Kubectl, which: str, error: Exception) -> str:
    with contextlib.suppress(JobError, Refused, IndexError):
        pod = read_pod(kubectl.get(which)[0])
        if pod.waiting or pod.message:
            return f"the pod that brings files does not start: {explain_wait(pod.waiting or pod.message, [])}"
    return f"the pod that brings files does not start: {error}"


def pod_for_files(workload: dict[str, Any]) -> dict[str, Any]:
    """A pod that may do what the run's own may, and has its claim. Raises JobError: they have none."""
    jobs, metadata = workload["spec"].get("replicatedJobs"), workload["metadata"]
    spec = (jobs[0]["template"]["spec"] if jobs else workload["spec"])["template"]["spec"]
    agent, name = spec["containers"][0], f"{metadata['name']}-files"
    volumes = [volume for volume in spec["volumes"] if volume["name"] == "runs"]
    if not any("persistentVolumeClaim" in volume for volume in volumes):
        remedy = "Name a claim in the site file, and the next run's files outlive its pods"
        raise JobError("claim", None, "the run folder was lost with its pods", remedy)
    container = {
        "name": "agent", "image": agent["image"], "imagePullPolicy": agent["imagePullPolicy"],
        "command": ["python3", "-I", "-c", f"import time; time.sleep({LIFE_S})"],
        "resources": {"requests": RESOURCES, "limits": RESOURCES}, "securityContext": agent["securityContext"],
        "volumeMounts": [mount for mount in agent["volumeMounts"] if mount["name"] == "runs"],
    }  # fmt: skip
    own = {
        "restartPolicy": "Never", "activeDeadlineSeconds": LIFE_S, "terminationGracePeriodSeconds": 1,
        "containers": [container], "volumes": volumes,
    }  # fmt: skip
    labels = {
        "app.kubernetes.io/name": "muster",
        "app.kubernetes.io/component": "files",
    }  # none of a run: it is no node
    place = {"namespace": metadata["namespace"]} if "namespace" in metadata else {}
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels, **place},
        "spec": {**{key: spec[key] for key in KEPT if key in spec}, **own},
    }  # fmt: skip
