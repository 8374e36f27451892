"""The rules on manifests bite: each finds the one thing that was broken in an example without faults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pod_rules  # noqa: F401  adds its rules
import pytest
import yaml
from manifest_rules import Manifest, problems
from paths import ROOT, SUPPORT

from trainer.config.load import merge_job, to_job, to_text
from trainer.launch.kubernetes.code import Code
from trainer.launch.kubernetes.manifests import make_manifests, render_manifests
from trainer.launch.kubernetes.site import KubernetesSite
from trainer.launch.platform import Plan
from trainer.run.folder import RunFolder

EXAMPLES = ROOT / "k8s/examples"
GONE = object()
ALL = {"action": "FailJob", "onExitCodes": {"containerName": "agent", "operator": "NotIn", "values": [0]}}
HOST = {"name": "host", "hostPath": {"path": "/"}}
OTHER = {"matchLabels": {"app": "other"}}
POD = "Job.spec.template.spec"
AGENT = f"{POD}.containers.0"
STEP = f"{POD}.initContainers.0"
SET_JOB = "JobSet.spec.replicatedJobs.0.template.spec"

# Example, what is changed (a number inserts into a list after "+"), its new value, a word of the finding.
BROKEN: list[tuple[str, str, Any, str]] = [
    ("digits", "Job.spec.completions", GONE, "Indexed"),
    ("digits", "Job.spec.completionMode", GONE, "Indexed"),
    ("digits", "Job.spec.parallelism", 1, "parallelism"),
    ("digits", "Job.spec.backoffLimitPerIndex", GONE, "doubles the pause"),
    ("digits", "Job.spec.maxFailedIndexes", GONE, "fail alone"),
    ("digits", "Job.spec.activeDeadlineSeconds", GONE, "activeDeadlineSeconds"),
    ("digits", "Job.spec.backoffLimit", GONE, "backoffLimit"),
    ("digits", "Job.spec.ttlSecondsAfterFinished", GONE, "for ever"),
    ("digits", f"{POD}.restartPolicy", "OnFailure", "Never"),
    ("digits", "Job.spec.podReplacementPolicy", "TerminatingOrFailed", "must be Failed"),
    ("digits", "Job.spec.podFailurePolicy.rules.+0", ALL, "75 leads to FailJob"),
    ("digits", "Job.spec.podFailurePolicy.rules.0", GONE, "64 leads to Count"),
    ("digits", "Job.spec.podFailurePolicy.rules.2", GONE, "DisruptionTarget leads to Count"),
    ("digits", "Job.spec.podFailurePolicy.rules.0.onExitCodes.values", [64, 3], "ordered"),
    ("digits", "Job.spec.podFailurePolicy.rules.2.onExitCodes", {}, "either"),
    ("digits", f"{AGENT}.name", "main", "container that the pod lacks"),
    ("jobset", "JobSet.spec.failurePolicy.rules.0", GONE, "64 leads to RestartJobSet"),
    ("jobset", "JobSet.spec.failurePolicy.rules.0.onJobFailureMessagePatterns", GONE, "75 leads to FailJobSet"),
    ("jobset", "JobSet.spec.failurePolicy.rules.2", GONE, "DisruptionTarget leads to RestartJobSet"),
    ("jobset", f"{SET_JOB}.backoffLimit", 3, "backoffLimit must be 0"),
    ("jobset", "JobSet.spec.network.subdomain", "other", "subdomain"),
    ("digits", "Job.metadata.name", "d" * 57, "no DNS label"),
    ("jobset", "JobSet.metadata.name", "d" * 49, "no DNS label"),
    ("digits", "Job.metadata.labels.a b", "c", "no label"),
    ("digits", "Job.metadata.labels.a", 1, "no label"),
    ("digits", f"{POD}.subdomain", "other", "host names"),
    ("digits", "Service.metadata.name", "other", "pods' subdomain"),
    ("digits", "Service.spec.selector.app", "other", "does not select the pods"),
    ("digits", "Service.spec.clusterIP", GONE, "not headless"),
    ("digits", "Service.spec.publishNotReadyAddresses", GONE, "before they are ready"),
    ("digits", f"{AGENT}.env.2.value", 2, "MUSTER_NODES is no string"),
    ("digits", f"{AGENT}.env.2.value", "3", "MUSTER_NODES is wrong"),
    ("digits", f"{AGENT}.env.1", {"name": "MUSTER_JOB_ID", "value": "x"}, "not the Job's uid"),
    ("digits", f"{AGENT}.env.+0", {"name": "JOB_COMPLETION_INDEX", "value": "0"}, "the Job controller's"),
    ("digits", f"{AGENT}.env.+0", {"name": "HOME", "value": "/tmp"}, "set twice"),
    ("digits", f"{POD}.terminationGracePeriodSeconds", 30, "grace period"),
    ("digits", f"{AGENT}.terminationMessagePath", "/tmp/x", "last word"),
    ("kueue", "Job.spec.suspend", GONE, "queue needs suspend"),
    ("digits", f"{AGENT}.securityContext.privileged", True, "escalation"),
    ("digits", f"{AGENT}.securityContext.allowPrivilegeEscalation", GONE, "escalation"),
    ("digits", f"{AGENT}.securityContext.capabilities.add", ["IPC_LOCK"], "capabilities"),
    ("digits", f"{AGENT}.securityContext.capabilities.drop", [], "capabilities"),
    ("digits", f"{POD}.securityContext.runAsUser", 0, "root"),
    ("digits", f"{POD}.securityContext.runAsNonRoot", GONE, "root"),
    ("digits", f"{POD}.securityContext.seccompProfile", GONE, "seccomp"),
    ("digits", f"{POD}.hostNetwork", True, "hostNetwork"),
    ("digits", f"{AGENT}.ports", [{"containerPort": 80, "hostPort": 80}], "host port"),
    ("digits", f"{POD}.volumes.+0", HOST, "volume host"),
    ("digits", f"{POD}.automountServiceAccountToken", GONE, "token"),
    ("digits", f"{POD}.enableServiceLinks", GONE, "leak"),
    ("digits", f"{AGENT}.securityContext.readOnlyRootFilesystem", GONE, "file system is writable"),
    ("digits", f"{AGENT}.volumeMounts.3", GONE, "TMPDIR"),
    ("gpu", f"{AGENT}.volumeMounts.1.readOnly", True, "MUSTER_RUN"),
    ("gpu", f"{POD}.volumes.1.persistentVolumeClaim.readOnly", True, "MUSTER_RUN"),
    ("digits", f"{POD}.volumes.1", GONE, "runs is no volume"),
    ("gpu", f"{POD}.volumes.1.emptyDir", {}, "several"),
    ("digits", f"{AGENT}.args", ["/etc/job.yaml"], "job file"),
    ("digits", "ConfigMap.metadata.name", "other", "job file"),
    ("digits", f"{POD}.volumes.2.emptyDir.medium", GONE, "no Memory"),
    ("digits", f"{POD}.volumes.2.emptyDir.sizeLimit", "3500Mi", "does not cover"),
    ("digits", f"{AGENT}.resources.limits.cpu", "500m", "below its request"),
    ("gpu", f"{AGENT}.resources.requests.nvidia~com/gpu", "4", "extended resources"),
    ("digits", "NetworkPolicy.spec.podSelector", OTHER, "does not select"),
    ("digits", "NetworkPolicy.spec.podSelector", {}, "them alone"),
    ("digits", "NetworkPolicy.spec.policyTypes", ["Ingress"], "direction"),
    ("digits", "NetworkPolicy.spec.ingress.+0", {}, "get in"),
    ("digits", "NetworkPolicy.spec.ingress.0.from.0.podSelector", {}, "get in"),
    ("digits", "NetworkPolicy.spec.ingress.0.ports", [{"port": 20000}], "ingress closes port 45678"),
    ("digits", "NetworkPolicy.spec.egress.0", GONE, "egress closes port 20000"),
    ("digits", "NetworkPolicy.spec.egress.1", GONE, "DNS over UDP"),
    ("digits", "NetworkPolicy.spec.egress.1.ports.1", GONE, "DNS over TCP"),
    ("digits", f"{POD}.topologySpreadConstraints.0.labelSelector", OTHER, "spread"),
    ("digits", f"{POD}.tolerations.0", GONE, "longer than the other agents wait"),
    ("digits", f"{POD}.tolerations.1.tolerationSeconds", 300, "longer than the other agents wait"),
    ("digits", "Job.metadata.annotations.a", True, "no string"),
    ("code", "Code.immutable", GONE, "may change"),
    ("code", "Code.binaryData.more", "A" * (256 << 10), "too large for kubectl apply"),
    ("code", "Code.metadata.labels", {}, "does not go with the job's objects"),
    ("code", f"{STEP}.volumeMounts.0.readOnly", GONE, "may be changed by the step"),
    ("code", f"{STEP}.command.2", "/unpack.py", "files that its volumes do not hold"),
    ("code", f"{POD}.volumes.0.configMap.items.1", GONE, "files that its volumes do not hold"),
    ("code", f"{STEP}.command.5", "/archive/other", "files that its volumes do not hold"),
    ("code", f"{AGENT}.volumeMounts.4.readOnly", GONE, "or may change it"),
    ("code", f"{AGENT}.workingDir", "/", "does not start where"),
    ("code", f"{STEP}.resources.limits.cpu", "8", "asks for other cpu"),
    ("code", f"{STEP}.securityContext.privileged", True, "escalation"),
    ("code", f"{STEP}.securityContext.readOnlyRootFilesystem", GONE, "file system is writable"),
]


def change(documents: list[Manifest], path: str, value: Any) -> None:
    """Put `value` at a path such as `Job.spec.x.0`; "+0" inserts, and "~" stands for a dot within a key."""
    kind, *parts, last = [part.replace("~", ".") for part in path.split(".")]
    kinds = ["Code" if "binaryData" in document else document["kind"] for document in documents]
    place = documents[kinds.index(kind)]
    for part in parts:
        place = place[int(part) if isinstance(place, list) else part]
    if last.startswith("+"):
        place.insert(int(last), value)
        return
    key = int(last) if isinstance(place, list) else last
    if value is GONE:
        del place[key]
    else:
        place[key] = value


def read(name: str) -> list[Manifest]:
    """An example; `code`: the first of them with code that goes with it."""
    if name == "code":
        config = merge_job(ROOT / "jobs/digits.yaml", ["nodes=2", "devices_per_node=1", "device=cpu"])
        plan = Plan(to_job(config), to_text(config), RunFolder(Path("digits-ID")), KubernetesSite())
        return list(yaml.safe_load_all(render_manifests(make_manifests(plan, Code(b"a tar", Path("/code"))))))
    return list(yaml.safe_load_all((EXAMPLES / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(("name", "path", "value", "word"), BROKEN, ids=[f"{case[1]}-{case[3]}" for case in BROKEN])
def test_what_is_broken_is_found(name: str, path: str, value: Any, word: str) -> None:
    documents = read(name)
    assert problems(documents) == []
    change(documents, path, value)
    found = problems(documents)
    assert any(word in text for text in found), found


def test_the_order_of_the_documents_matters() -> None:
    documents = read("digits")
    assert problems([documents[-1], *documents[:-1]]) == ["the Job is not applied last"]


def test_every_rule_is_seen_to_bite() -> None:
    """A rule is a function that yields texts: each text has its case above, or is the one about order."""
    sources = "".join((SUPPORT / f"{name}.py").read_text() for name in ("manifest_rules", "pod_rules"))
    texts = re.findall(r'yield f?"([^"]+)"', sources)
    assert len(texts) > 40
    seen = set()
    for name, path, value, _ in BROKEN:
        documents = read(name)
        change(documents, path, value)
        seen.update(problems(documents))
    patterns = {text: re.sub(r"\\\{.*?\\\}", ".*", re.escape(text)) for text in texts}
    never = [text for text, pattern in patterns.items() if not any(re.fullmatch(pattern, each) for each in seen)]
    assert never == ["the Job is not applied last"]
