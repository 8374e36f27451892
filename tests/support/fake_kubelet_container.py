"""A pod's container as words of `docker run`: exactly what its manifest says, or an error for what is not modelled.

Each rule names its page of kubernetes.io/docs.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

from fake_api_server import Cluster, Object

MODELLED = {
    "name", "image", "imagePullPolicy", "command", "args", "env", "resources", "terminationMessagePath",
    "terminationMessagePolicy", "securityContext", "volumeMounts", "workingDir",
}  # fmt: skip
WORD = "/dev/termination-log"
"""Where a container's last word is, if it does not say."""


def run_words(pod: Object, container: Object, cluster: Cluster, folder: Path, image: str) -> list[str]:
    """Options, image and arguments of one of its containers; `image` stands for the one that the manifest names.

    Limits: concepts/configuration/manage-resources-containers. Command and arguments:
    tasks/inject-data-application/define-command-argument-container. The file for the last word:
    tasks/debug/debug-application/determine-reason-pod-failure.
    """
    spec = pod["spec"]
    assert set(container) <= MODELLED, f"not modelled: {set(container) - MODELLED}"
    name = pod["metadata"]["name"]
    home = folder / "pods" / name
    home.mkdir(parents=True, exist_ok=True)
    words = [f"--hostname={spec['hostname']}"] if "hostname" in spec else []
    words += [f"--env={key}={value}" for key, value in variables(pod, container, cluster).items()]
    words += security(spec["securityContext"], container["securityContext"])
    limits = container["resources"]["limits"]
    memory = int(bytes_of(limits["memory"]))
    words += [
        f"--memory={memory}",
        f"--memory-swap={memory}",
        f"--cpus={min(cores_of(limits['cpu']), os.cpu_count() or 1)}",
    ]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    group = spec["securityContext"]["fsGroup"]
    for mount in container["volumeMounts"]:
        words.append(mounted(volumes[mount["name"]], mount, cluster, folder, home, group))
    log = home / f"termination-log-{container['name']}"
    log.touch()
    log.chmod(0o666)  # as the kubelet makes it
    words.append(f"--mount=type=bind,source={log},target={container.get('terminationMessagePath', WORD)}")
    if "command" in container:
        words.append(f"--entrypoint={container['command'][0]}")
    if "workingDir" in container:
        words.append(f"--workdir={container['workingDir']}")
    return [*words, image, *container.get("command", [])[1:], *container.get("args", [])]


def variables(pod: Object, container: Object, cluster: Cluster) -> dict[str, str]:
    """Variables; some are labels (concepts/workloads/pods/downward-api) or Secrets (concepts/configuration/secret)."""
    found = {}
    for entry in container.get("env", []):
        if "value" in entry:
            found[entry["name"]] = entry["value"]
            continue
        if (wanted := entry["valueFrom"].get("secretKeyRef")) is not None:
            found[entry["name"]] = cluster.objects["secrets", wanted["name"]]["stringData"][wanted["key"]]
            continue
        path = entry["valueFrom"]["fieldRef"]["fieldPath"]
        (key,) = re.fullmatch(r"metadata\.labels\['(.*)'\]", path).groups()
        found[entry["name"]] = pod["metadata"]["labels"][key]
    return found


def security(pod: Object, container: Object) -> list[str]:
    """The security context (tasks/configure-pod-container/security-context)."""
    assert pod["runAsNonRoot"]
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}  # which the engine's default profile is
    words = [f"--user={pod['runAsUser']}:{pod['runAsGroup']}", f"--group-add={pod['fsGroup']}"]
    words += ["--security-opt=no-new-privileges"] if container["allowPrivilegeEscalation"] is False else []
    words += ["--read-only"] if container["readOnlyRootFilesystem"] else []
    return [*words, *(f"--cap-drop={name}" for name in container["capabilities"]["drop"])]


def mounted(volume: Object, mount: Object, cluster: Cluster, folder: Path, home: Path, group: int) -> str:
    """One volume where the container sees it (concepts/storage/volumes)."""
    target, read_only = mount["mountPath"], ",readonly" if mount.get("readOnly") else ""
    empty: Any = volume.get("emptyDir")
    if empty is not None and empty.get("medium") == "Memory":
        return f"--mount=type=tmpfs,target={target},tmpfs-size={int(bytes_of(empty['sizeLimit']))},tmpfs-mode=1777"
    if empty is not None:
        source = home / volume["name"]
        source.mkdir(exist_ok=True)  # the containers of a pod share it
    elif "configMap" in volume or "projected" in volume:
        source = home / volume["name"]
        for each in volume.get("projected", {}).get("sources", [volume]):
            write_map(each["configMap"], cluster, source)
        return f"--mount=type=bind,source={source},target={target},readonly"
    else:
        source = folder / "claims" / volume["persistentVolumeClaim"]["claimName"]
    os.chown(source, -1, group)  # fsGroup: the volume's group may write, and what is made in it keeps the group
    source.chmod(0o2770 if empty is None else 0o2777)
    return f"--mount=type=bind,source={source},target={target}{read_only}"


def write_map(wanted: Object, cluster: Cluster, folder: Path) -> None:
    """A ConfigMap's keys as files; with items, those alone, by their paths (concepts/configuration/configmap)."""
    found = cluster.objects["configmaps", wanted["name"]]
    data = {key: text.encode() for key, text in found.get("data", {}).items()}
    data |= {key: base64.b64decode(text) for key, text in found.get("binaryData", {}).items()}
    paths = {item["path"]: item["key"] for item in wanted.get("items", [])} or {key: key for key in data}
    for path, key in paths.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data[key])


def cores_of(text: str) -> float:
    """A quantity of processors, which may be in thousandths (as above)."""
    return float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1)


def bytes_of(text: str) -> float:
    """A quantity of memory (reference/kubernetes-api/common-definitions/quantity)."""
    digits, unit = re.fullmatch(r"([\d.]+)(Ki|Mi|Gi)", text).groups()
    return float(digits) * 1024 ** (1 + ("Ki", "Mi", "Gi").index(unit))
