"""What the API's schemas leave open in a job's manifests: each rule names its source and returns what it finds wrong.

Sources, unless a rule names another: the concepts pages of kubernetes.io on Jobs, Pods, Services, DNS and labels, and
the API reference's descriptions of the fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import yaml

Manifest = dict[str, Any]
LABEL = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"  # RFC 1035, as Services want it
QUALIFIED = r"(?=[^/]*/?[^/]{1,63}$)([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?"
SHM_MARGIN = 2**30
GRACE_MARGIN_S = 10


def problems(documents: list[Manifest]) -> list[str]:
    """All that is wrong with the manifests of one job."""
    return [text for rule in RULES for text in rule(documents)]


def only(documents: list[Manifest], *kinds: str) -> Manifest:
    """The document of one of these kinds; ConfigMaps of the run's code apart."""
    (found,) = (document for document in documents if document["kind"] in kinds and "binaryData" not in document)
    return found


def job_spec(documents: list[Manifest]) -> Manifest:
    """The Job's spec, of the JobSet's only Job where there is one."""
    owner = only(documents, "Job", "JobSet")
    spec = owner["spec"]
    return spec if owner["kind"] == "Job" else spec["replicatedJobs"][0]["template"]["spec"]


def pod_spec(documents: list[Manifest]) -> Manifest:
    return job_spec(documents)["template"]["spec"]


def pod_labels(documents: list[Manifest]) -> dict[str, str]:
    return job_spec(documents)["template"]["metadata"]["labels"]


def container(documents: list[Manifest]) -> Manifest:
    (found,) = pod_spec(documents)["containers"]
    return found


def variables(documents: list[Manifest]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value") for entry in container(documents)["env"]}


def job_name(documents: list[Manifest]) -> str:
    """The Job's name; a JobSet makes it of its own, the replicated job's and the index (placement.GenJobName)."""
    owner = only(documents, "Job", "JobSet")
    name = owner["metadata"]["name"]
    return name if owner["kind"] == "Job" else f"{name}-{owner['spec']['replicatedJobs'][0]['name']}-0"


def number(text: str) -> Decimal:
    digits, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text)).groups()
    powers = {"": 1, "m": Decimal("0.001")}
    powers |= {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTP", 1)}
    powers |= {letter: Decimal(1000) ** power for power, letter in enumerate("kMGTP", 1)}
    return Decimal(digits) * powers[unit]


def gang(documents: list[Manifest]) -> Iterator[str]:
    """All nodes at once, each under its index, none on its own."""
    spec = job_spec(documents)
    if spec.get("completionMode") != "Indexed" or not spec.get("completions"):
        yield "not Indexed with completions: pods have no index"
    if spec.get("parallelism") != spec.get("completions"):
        yield "parallelism differs from completions: the nodes would wait for one that is not started"
    if only(documents, "Job", "JobSet")["kind"] == "Job":
        # Without a limit for each index, the pods of a gang share one pause, which doubles with each of them (the Job
        # controller's backoff_utils.go counts evicted pods, too). With one, an index may fail alone, unless none may.
        if not isinstance(spec.get("backoffLimitPerIndex"), int):
            yield "backoffLimitPerIndex is missing: each lost pod doubles the pause of all others"
        elif spec.get("maxFailedIndexes") != 0:
            yield "backoffLimitPerIndex without maxFailedIndexes 0 lets one node fail alone"
    for field in ("backoffLimit", "activeDeadlineSeconds"):
        if not isinstance(spec.get(field), int):
            yield f"{field} is missing: a job that fails or hangs would not end"
    if "ttlSecondsAfterFinished" not in only(documents, "Job", "JobSet")["spec"]:
        yield "ttlSecondsAfterFinished is missing: ended jobs stay for ever"


def failure_policy(documents: list[Manifest]) -> Iterator[str]:
    """The API's own validation of podFailurePolicy, and the exit codes of ours."""
    spec = job_spec(documents)
    if pod_spec(documents).get("restartPolicy") != "Never":
        yield "podFailurePolicy works with restartPolicy Never only"
    if spec.get("podReplacementPolicy") != "Failed":
        yield "podReplacementPolicy must be Failed with podFailurePolicy"
    rules, agent = spec.get("podFailurePolicy", {}).get("rules", []), container(documents)["name"]
    for rule in rules:
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield "a rule needs either exit codes or pod conditions"
        codes = rule.get("onExitCodes", {})
        values = codes.get("values", [1])
        if values != sorted(set(values)) or (codes.get("operator") == "In" and 0 in values):
            yield f"exit codes {values} must be ordered, different, and not 0"
        # A step before the agent only says that the job is wrong: without a name, a rule is about all containers.
        if "onExitCodes" in rule and codes.get("containerName") != (None if values == [64] else agent):
            yield "a rule names a container that the pod lacks"
    if only(documents, "Job", "JobSet")["kind"] == "Job":
        expected = {64: "FailJob", 75: "Ignore", "DisruptionTarget": "Ignore", 1: "FailJob", 137: "Count"}
        for cause, action in expected.items():
            found = decide(rules, cause)
            if found != action:
                yield f"{cause} leads to {found} instead of {action}"


def decide(rules: list[Manifest], cause: int | str) -> str:
    """What a pod failure policy does about an exit code or a condition: the first rule that matches."""
    for rule in rules:
        if "onExitCodes" in rule and isinstance(cause, int):
            inside = cause in rule["onExitCodes"].get("values", [])
            if inside == (rule["onExitCodes"].get("operator") == "In"):
                return rule["action"]
        if any(
            each["type"] == cause and each.get("status", "True") == "True" for each in rule.get("onPodConditions", [])
        ):
            return rule["action"]
    return "Count"


def jobset_restarts(documents: list[Manifest]) -> Iterator[str]:
    """JobSet's failure policy, rule by rule against the messages of the Job controller (pod_failure_policy.go)."""
    owner = only(documents, "Job", "JobSet")
    if owner["kind"] == "Job":
        return
    rules, policy = job_spec(documents)["podFailurePolicy"]["rules"], owner["spec"].get("failurePolicy", {})
    expected = {64: "FailJobSet", 1: "FailJobSet", 75: "RestartJobSetAndIgnoreMaxRestarts", 137: "RestartJobSet"}
    expected |= {"DisruptionTarget": "RestartJobSetAndIgnoreMaxRestarts"}
    for cause, action in expected.items():
        final = decide(rules, cause) == "FailJob"
        reason = "PodFailurePolicy" if final else "BackoffLimitExceeded"
        text = f"Container agent for pod a/b failed with exit code {cause} matching FailJob rule at index 0"
        message = text if isinstance(cause, int) else f"Pod a/b has condition {cause} matching FailJob rule at index 0"
        for rule in policy.get("rules", []):
            patterns = rule.get("onJobFailureMessagePatterns") or [""]
            fits = any(re.search(pattern, message) for pattern in patterns)
            if fits and reason in rule.get("onJobFailureReasons", [reason]):
                found = rule["action"]
                break
        else:
            found = "RestartJobSet"
        if found != action:
            yield f"{cause} leads to {found} instead of {action}"
    if job_spec(documents)["backoffLimit"] != 0:
        yield "a Job of the JobSet replaces pods alone: backoffLimit must be 0"


def names(documents: list[Manifest]) -> Iterator[str]:
    """DNS labels of at most 63 characters: objects, host names, pods with their random ending."""
    last = f"{job_name(documents)}-{job_spec(documents).get('completions', 1) - 1}"
    for name in (*(document["metadata"]["name"] for document in documents), last, f"{last}-abcde"):
        if not re.fullmatch(LABEL, name):
            yield f"{name} is no DNS label"
    for document in documents:
        for path, labels in walk(document, "labels"):
            for key, value in labels.items():
                good = re.fullmatch(QUALIFIED, key) and re.fullmatch(
                    r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?", str(value)
                )
                if not good or not isinstance(value, str):
                    yield f"{path}: {key}={value!r} is no label"


def walk(value: Any, key: str, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping below `key`."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, key, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == key and isinstance(item, dict):
                yield f"{path}.{name}", item
            yield from walk(item, key, f"{path}.{name}")


def host_names(documents: list[Manifest]) -> Iterator[str]:
    """<job>-<index>.<subdomain> resolves through a headless Service of the subdomain's name that selects the pods."""
    owner, subdomain = only(documents, "Job", "JobSet"), pod_spec(documents).get("subdomain")
    count = job_spec(documents).get("completions", 0)
    expected = ",".join(f"{job_name(documents)}-{index}.{subdomain}" for index in range(count))
    if variables(documents).get("MUSTER_HOSTNAMES") != expected:
        yield "MUSTER_HOSTNAMES are not the pods' host names"
    if owner["kind"] == "JobSet":
        if owner["spec"]["network"].get("subdomain", owner["metadata"]["name"]) != subdomain:
            yield "the JobSet's subdomain is not the pods'"
        return
    service = only(documents, "Service")
    if service["metadata"]["name"] != subdomain:
        yield "the Service's name is not the pods' subdomain"
    if not service["spec"]["selector"].items() <= pod_labels(documents).items():
        yield "the Service does not select the pods"
    if service["spec"].get("clusterIP") != "None":
        yield "the Service is not headless"
    if service["spec"].get("publishNotReadyAddresses") is not True:
        yield "publishNotReadyAddresses is missing: the agents meet before they are ready"


def launch(documents: list[Manifest]) -> Iterator[str]:
    """The variables that wire the agents, and the job file."""
    entries = container(documents)["env"]
    for entry in entries:
        if "value" in entry and not isinstance(entry["value"], str):
            yield f"{entry['name']} is no string"
    if len({entry["name"] for entry in entries}) != len(entries):
        yield "a variable is set twice"
    given, count = variables(documents), str(job_spec(documents).get("completions"))
    if given.get("MUSTER_PLATFORM") != "kubernetes" or given.get("MUSTER_NODES") != count:
        yield "MUSTER_PLATFORM or MUSTER_NODES is wrong"
    source = [entry.get("valueFrom") for entry in entries if entry["name"] == "MUSTER_JOB_ID"]
    if source != [{"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}}]:
        yield "MUSTER_JOB_ID is not the Job's uid: pods of an earlier Job of this name would be accepted"
    if [entry.get("valueFrom") for entry in entries if entry["name"] == "MUSTER_SECRET"] != source:
        yield "MUSTER_SECRET is not the Job's uid: nobody makes another one by hand"
    if "JOB_COMPLETION_INDEX" in given:
        yield "JOB_COMPLETION_INDEX is the Job controller's"
    if pod_spec(documents)["terminationGracePeriodSeconds"] < job(documents)["agent"]["grace_s"] + GRACE_MARGIN_S:
        yield "the grace period ends before agent.grace_s does"
    if given.get("MUSTER_TERMINATION_LOG") != container(documents).get("terminationMessagePath"):
        yield "the last word is not written where it is read"


def job(documents: list[Manifest]) -> Manifest:
    """The job file."""
    return yaml.safe_load(only(documents, "ConfigMap")["data"]["job.yaml"])


def queue(documents: list[Manifest]) -> Iterator[str]:
    """Kueue takes over a job with its label that is created suspended."""
    owner = only(documents, "Job", "JobSet")
    if ("kueue.x-k8s.io/queue-name" in owner["metadata"]["labels"]) != bool(owner["spec"].get("suspend")):
        yield "a queue needs suspend, and suspend a queue"


RULES: list[Callable[[list[Manifest]], Iterator[str]]] = [
    gang, failure_policy, jobset_restarts, names, host_names, launch, queue,
]  # fmt: skip
