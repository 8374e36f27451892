"""More rules on a job's manifests: what its pods may do (restricted Pod Security, NetworkPolicy), hold and write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from manifest_rules import (
    RULES,
    SHM_MARGIN,
    Manifest,
    container,
    job,
    job_spec,
    number,
    only,
    pod_labels,
    pod_spec,
    variables,
    walk,
)  # fmt: skip

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def restricted(documents: list[Manifest]) -> Iterator[str]:
    """Pod Security Standards, level restricted, control by control (kubernetes.io, concepts/security)."""
    pod = pod_spec(documents)
    outer = pod.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"restricted: {name}"
    for inner in (each.get("securityContext", {}) for each in (*pod.get("initContainers", []), *pod["containers"])):
        if inner.get("privileged") or inner.get("allowPrivilegeEscalation") is not False:
            yield "restricted: privilege escalation"
        if inner.get("capabilities", {}).get("drop") != ["ALL"] or inner["capabilities"].get("add"):
            yield "restricted: capabilities"
        roots = 0 in (inner.get("runAsUser"), outer.get("runAsUser"))
        if roots or not inner.get("runAsNonRoot", outer.get("runAsNonRoot")):
            yield "restricted: runs as root"
        profile = inner.get("seccompProfile", outer.get("seccompProfile", {}))
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            yield "restricted: seccomp"
    for volume in pod["volumes"]:
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"restricted: volume {volume['name']}"
    for port in container(documents).get("ports", []):
        if port.get("hostPort"):
            yield "restricted: host port"


def least_privilege(documents: list[Manifest]) -> Iterator[str]:
    """What the standard leaves open and a training job does not need."""
    pod = pod_spec(documents)
    if pod.get("automountServiceAccountToken") is not False:
        yield "a service account's token is mounted"
    if pod.get("enableServiceLinks") is not False:
        yield "variables of other Services leak in"
    contexts = [each.get("securityContext", {}) for each in (*pod.get("initContainers", []), *pod["containers"])]
    if any(context.get("readOnlyRootFilesystem") is not True for context in contexts):
        yield "the root file system is writable"


def volumes(documents: list[Manifest]) -> Iterator[str]:
    """What is mounted exists, and what is written to can be written to."""
    pod = pod_spec(documents)
    known = {volume["name"]: volume for volume in pod["volumes"]}
    writable = []
    for mount in container(documents)["volumeMounts"]:
        volume = known.get(mount["name"])
        if volume is None or len(volume) != 2:
            yield f"{mount['name']} is no volume, or has no source or several"
            continue
        claim = volume.get("persistentVolumeClaim")
        if not mount.get("readOnly") and ("emptyDir" in volume or (claim and not claim.get("readOnly"))):
            writable.append(mount["mountPath"])
    for name in ("HOME", "TMPDIR", "MUSTER_RUN"):
        path = variables(documents).get(name) or ""
        if not any(path == place or path.startswith(f"{place}/") for place in writable):
            yield f"{name} is not on a writable volume"
    config = only(documents, "ConfigMap")
    mounted = [
        volume for volume in pod["volumes"] if volume.get("configMap", {}).get("name") == config["metadata"]["name"]
    ]
    paths = [mount["mountPath"] for mount in container(documents)["volumeMounts"] if mount["name"] in
             [volume["name"] for volume in mounted]]  # fmt: skip
    if "job.yaml" not in config["data"] or [f"{path}/job.yaml" for path in paths] != container(documents)["args"]:
        yield "the agent is not given the job file of the ConfigMap"


def code(documents: list[Manifest]) -> Iterator[str]:
    """The step that unpacks the run's code is given what its volumes hold, and the agent cannot change what it unpacks.

    A ConfigMap holds at most 1 MiB, and `kubectl apply` repeats it in an annotation, of which the API takes 256 KiB.
    """
    pod, agent = pod_spec(documents), container(documents)
    maps = {each["metadata"]["name"]: each for each in documents if each["kind"] == "ConfigMap"}
    data, own = only(documents, "ConfigMap")["data"], only(documents, "ConfigMap")["metadata"]["labels"]
    for name, each in maps.items():
        if each.get("immutable") is not True or len(json.dumps(each)) > 256 << 10:
            yield f"{name} may change, or is too large for kubectl apply"
        if each["metadata"]["labels"] != own:
            yield f"{name} does not go with the job's objects"
    for step in pod.get("initContainers", []):
        known = {volume["name"]: volume for volume in pod["volumes"]}
        there = []
        for mount in step["volumeMounts"]:
            volume = known[mount["name"]]
            for source in volume.get("projected", {}).get("sources", []):
                there += [f"{mount['mountPath']}/{key}" for key in maps[source["configMap"]["name"]]["binaryData"]]
            items = volume.get("configMap", {}).get("items", [])
            there += [f"{mount['mountPath']}/{item['path']}" for item in items if item["key"] in data]
            if not mount.get("readOnly") and "emptyDir" not in volume:
                yield f"{mount['name']} may be changed by the step before the agent"
        _, _, script, _, folder, *parts = step["command"]
        if not {script, *parts} <= {*there, *(part for part in parts if part.startswith("/runs/"))}:
            yield "the step before the agent is given files that its volumes do not hold"
        if {"name": "code", "mountPath": folder, "readOnly": True} not in agent["volumeMounts"]:
            yield "the agent has no code, or may change it"
        if agent.get("workingDir") != folder:
            yield "the agent does not start where its code is"
        for name, amount in step["resources"]["limits"].items():
            if amount != agent["resources"]["limits"].get(name):
                yield f"the step before the agent asks for other {name}"


def memory(documents: list[Manifest]) -> Iterator[str]:
    """A Memory emptyDir counts against the memory limit of the containers that write to it."""
    resources, pod = container(documents)["resources"], pod_spec(documents)
    mounts = {mount["mountPath"]: mount["name"] for mount in container(documents)["volumeMounts"]}
    (shm,) = [volume for volume in pod["volumes"] if volume["name"] == mounts.get("/dev/shm")] or [{}]
    if shm.get("emptyDir", {}).get("medium") != "Memory" or "sizeLimit" not in shm["emptyDir"]:
        yield "/dev/shm is no Memory emptyDir with a size"
    elif number(resources["limits"]["memory"]) < number(shm["emptyDir"]["sizeLimit"]) + SHM_MARGIN:
        yield "the memory limit does not cover /dev/shm"
    for name, amount in resources["requests"].items():
        limit = resources["limits"].get(name)
        if limit is None or number(limit) < number(amount):
            yield f"{name} is limited below its request"
        if "/" in name and (amount != limit or number(amount) != int(number(amount))):
            yield f"{name}: extended resources are whole, and requested as they are limited"


def network(documents: list[Manifest]) -> Iterator[str]:
    """Pods of the job reach each other on every port, and DNS; nobody else reaches them."""
    policy, own = only(documents, "NetworkPolicy"), pod_labels(documents)
    strange = {"app.kubernetes.io/name": "muster", "app.kubernetes.io/instance": "another-job"}
    if not selects(policy["spec"]["podSelector"], own) or selects(policy["spec"]["podSelector"], strange):
        yield "the NetworkPolicy does not select the job's pods, and them alone"
    if set(policy["spec"].get("policyTypes", [])) != {"Ingress", "Egress"}:
        yield "the NetworkPolicy leaves a direction open"
    for direction, side in (("ingress", "from"), ("egress", "to")):
        rules = policy["spec"].get(direction, [])
        for port in (20000, 45678):
            if not any(allows(rule, side, own, port, "TCP") for rule in rules):
                yield f"{direction} closes port {port} between the job's pods"
    if any(allows(rule, "from", strange, port, "TCP") for rule in policy["spec"]["ingress"] for port in (53, 20000)):
        yield "another job's pods get in"
    for protocol in ("UDP", "TCP"):
        if not any(allows(rule, "to", {"k8s-app": "kube-dns"}, 53, protocol) for rule in policy["spec"]["egress"]):
            yield f"DNS over {protocol} is closed"


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "only matchLabels is modelled"
    return selector.get("matchLabels", {}).items() <= labels.items()


def allows(rule: Manifest, side: str, labels: dict[str, str], port: int, protocol: str) -> bool:
    """Whether a rule lets a pod of the same namespace with these labels through; no peers or ports means all."""
    peers, ports = rule.get(side), rule.get("ports")
    if ports and not any(each.get("protocol", "TCP") == protocol and each.get("port", port) == port for each in ports):
        return False
    return not peers or any("ipBlock" in peer or selects(peer.get("podSelector", {}), labels) for peer in peers)


def placement(documents: list[Manifest]) -> Iterator[str]:
    """Spread constraints count the pods that they select."""
    for constraint in pod_spec(documents).get("topologySpreadConstraints", []):
        if not selects(constraint["labelSelector"], pod_labels(documents)):
            yield "the spread constraint does not count the job's pods"


def dead_nodes(documents: list[Manifest]) -> Iterator[str]:
    """Only a real control plane taints nodes and evicts by it (concepts/scheduling-eviction/taint-and-toleration): it
    adds 300 s for these two taints to a pod that does not name them (the plugin DefaultTolerationSeconds), and of
    several tolerations for one taint the shortest counts.
    """
    wait_s = job(documents)["agent"]["rejoin_timeout_s"]
    for taint in ("unreachable", "not-ready"):
        key = f"node.kubernetes.io/{taint}"
        found = [each for each in pod_spec(documents).get("tolerations", []) if each.get("key") == key]
        seconds = [each.get("tolerationSeconds", 300) for each in found if each.get("effect") == "NoExecute"]
        if not seconds or min(seconds) + 50 > wait_s:
            yield f"{key} is tolerated for longer than the other agents wait"


def texts(documents: list[Manifest]) -> Iterator[str]:
    """Annotations, selectors and data are strings: the API refuses numbers and booleans."""
    for document in documents:
        for key in ("annotations", "matchLabels", "nodeSelector", "selector", "data"):
            for path, found in walk(document, key):
                if not all(isinstance(value, str) for value in flat(found)):
                    yield f"{document['kind']}{path} holds a value that is no string"


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from flat(item)
    else:
        yield value


def owner_is_last(documents: list[Manifest]) -> Iterator[str]:
    """kubectl applies in order: policy, job file and Service are there before the first pod starts."""
    if documents[-1]["kind"] not in ("Job", "JobSet") or not job_spec(documents):
        yield "the Job is not applied last"


RULES += [restricted, least_privilege, volumes, code, memory, network, placement, dead_nodes, texts, owner_is_last]
