"""The Kubernetes platform's site: `k8s/site.yaml` as a dataclass, and the checks that the API server makes too late."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from trainer.config.job import Job
from trainer.errors import JobError
from trainer.launch.fabric import fabric_environment
from trainer.launch.site import read_site
from trainer.wiring.hardware import WORKER_SHM_MB

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""A DNS label (RFC 1123)."""
SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
"""A DNS subdomain: names of Secrets, claims and classes."""
QUALIFIED = re.compile(
    r"((?=[^/]{1,253}/)[a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
)
"""A qualified name: keys of labels and annotations, resources."""
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
OURS = re.compile(
    r"(MUSTER|TORCHELASTIC)_\w+|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|HOME|TMPDIR|"
    r"JOB_COMPLETION_INDEX|CUDA_VISIBLE_DEVICES"
)
"""Variables that wire the pods: a site that set them would contradict the launch."""
PATHS = ("/", "/dev/shm", "/etc/muster", "/runs", "/tmp")
MARGIN = 2**30
"""Bytes that a pod needs beside its shared memory: interpreters and torch of the agent and its ranks."""


@dataclass
class KubernetesSite:
    """`k8s/site.yaml`: see there for what each key means."""

    context: str | None = None
    namespace: str | None = None
    kind: str = "job"
    image: str = "muster"
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    cpu: str = "1"
    memory: str = "4Gi"
    shm: str = "1Gi"
    gpu: str | None = None
    resources: dict[str, str] = field(default_factory=dict)
    claim: str | None = None
    claim_size: str | None = None
    claim_access_mode: str = "ReadWriteMany"
    claim_storage_class: str | None = None
    mounts: list[str] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[Any] = field(default_factory=list)
    spread: str | None = "kubernetes.io/hostname"
    spread_policy: str = "ScheduleAnyway"
    priority_class: str | None = None
    runtime_class: str | None = None
    queue: str | None = None
    user_id: int = 10001
    group_id: int = 10001
    annotations: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    fabric: str = "none"
    egress: list[Any] = field(default_factory=list)
    time_limit_min: int = 10080
    keep_finished_min: int = 10080


def load_kubernetes_site(path: Path | None) -> KubernetesSite:
    """Read and check a site file.

    Raises:
        JobError: unknown key, wrong type, or a value that no cluster would take.
    """
    site = read_site(path, "k8s", KubernetesSite)
    _check_choices(site)
    _check_names(site)
    _check_amounts(site)
    _check_storage(site)
    for index, rule in enumerate(site.tolerations):
        _check_keys(f"tolerations[{index}]", rule, ("key", "operator", "value", "effect", "tolerationSeconds"))
    for index, rule in enumerate(site.egress):
        _check_keys(f"egress[{index}]", rule, ("to", "ports"))
    fabric_environment(site.fabric)
    return site


def check_fit(site: KubernetesSite, job: Job) -> None:
    """Refuse a job that this site's pods cannot hold.

    Raises:
        JobError: no GPUs here, too little shared memory for the loader workers.
    """
    if job.device == "cuda" and site.gpu is None:
        raise JobError(
            "device",
            job.device,
            "the site names no resource to ask for GPUs by",
            "Set gpu in the site file, for example nvidia.com/gpu, or device=cpu",
        )
    needed = job.data.workers * job.ranks_per_node * WORKER_SHM_MB * 2**20 if job.task else 0
    if quantity("shm", site.shm) < needed:
        raise JobError(
            "shm",
            site.shm,
            f"{job.data.workers} loader workers for each of {job.ranks_per_node} ranks may need {needed >> 20}Mi",
            "Raise shm, and memory with it, in the site file, or lower data.workers",
        )


def quantity(key: str, text: str) -> Decimal:
    """A Kubernetes quantity as a number.

    Raises:
        JobError: it is none.
    """
    match = QUANTITY.fullmatch(text)
    if match is None:
        raise JobError(key, text, "is no Kubernetes quantity", "Write for example 500m, 2, 512Mi or 64Gi")
    digits, unit = match.groups()
    if unit is None or unit == "m":
        return Decimal(digits) / (1000 if unit else 1)
    base, power = (1024, unit[0]) if unit.endswith("i") else (1000, unit.upper())
    return Decimal(digits) * Decimal(base) ** (1 + "KMGTPE".index(power))


def split_mount(text: str) -> tuple[str, str, bool]:
    """Claim, path and whether it is read-only, of one entry of `mounts`.

    Raises:
        JobError: it is not claim:/path[:ro], or would hide a folder that the job needs.
    """
    claim, _, rest = text.partition(":")
    path, _, option = rest.partition(":")
    if not SUBDOMAIN.fullmatch(claim) or not path.startswith("/") or option not in ("", "ro"):
        raise JobError("mounts", text, "is not claim:/path or claim:/path:ro", "For example data:/data:ro")
    if (path.rstrip("/") or "/") in PATHS:
        raise JobError("mounts", text, f"{path} is taken", "Mount it elsewhere, for example at /data")
    return claim, path, option == "ro"


def _check_choices(site: KubernetesSite) -> None:
    for key, known in (
        ("kind", ("job", "jobset")),
        ("image_pull_policy", ("Always", "IfNotPresent", "Never")),
        ("claim_access_mode", ("ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod")),
        ("spread_policy", ("ScheduleAnyway", "DoNotSchedule")),
    ):
        if getattr(site, key) not in known:
            raise JobError(key, getattr(site, key), "is none of " + ", ".join(known), "Choose one of them")
    if site.spread is None and site.spread_policy != "ScheduleAnyway":
        raise JobError(
            "spread_policy", site.spread_policy, "would be ignored: spread is null", "Remove it, or set spread"
        )


def _check_names(site: KubernetesSite) -> None:
    _match(
        "image",
        site.image,
        re.compile(r"[a-z0-9]\S*"),
        "is no image name",
        "For example registry.example/team/muster:1",
    )
    _match("namespace", site.namespace, LABEL, "is no namespace's name", "Use a-z, 0-9 and '-', at most 63 characters")
    for key in ("claim", "claim_storage_class", "priority_class", "runtime_class", "image_pull_secrets", "secrets"):
        value = getattr(site, key)
        for name in value if isinstance(value, list) else [value]:
            _match(key, name, SUBDOMAIN, "is no object's name", "Use a-z, 0-9, '-' and '.'")
    _match("queue", site.queue, LABEL_VALUE, "cannot be a label's value", "Give the name of a LocalQueue")
    _match("spread", site.spread, QUALIFIED, "is no label of nodes", "For example topology.kubernetes.io/zone")
    _match("gpu", site.gpu, QUALIFIED, "is no resource's name", "For example nvidia.com/gpu")
    for key in ("resources", "node_selector", "annotations"):
        for name in getattr(site, key):
            _match(f"{key}.{name}", name, QUALIFIED, "is no qualified name", "Use [domain/]name")
    for name, value in site.node_selector.items():
        _match(
            f"node_selector.{name}", value, LABEL_VALUE, "cannot be a label's value", "kubectl get nodes --show-labels"
        )
    for name, value in site.env.items():
        _match(f"env.{name}", name, VARIABLE, "is no variable's name", "Use letters, digits and '_'")
        if OURS.fullmatch(name):
            raise JobError(f"env.{name}", value, "is set by the launch", "Remove it: Muster wires the pods")


def _check_amounts(site: KubernetesSite) -> None:
    for name, text in site.resources.items():
        quantity(f"resources.{name}", text)
        if name in ("cpu", "memory", site.gpu):
            raise JobError(
                f"resources.{name}", text, "has a key of its own", "Set cpu, memory or gpu, the job the number"
            )
    if quantity("cpu", site.cpu) <= 0:
        raise JobError("cpu", site.cpu, "is nothing", "Give at least 100m, better one for each rank")
    shm, memory = quantity("shm", site.shm), quantity("memory", site.memory)
    if memory < shm + MARGIN:
        raise JobError(
            "memory",
            site.memory,
            f"does not cover shm={site.shm}, which counts against it, and 1Gi to run in",
            "Raise memory, or lower shm",
        )
    for key, least in (("user_id", 1), ("group_id", 1), ("time_limit_min", 1), ("keep_finished_min", 0)):
        if getattr(site, key) < least:
            why = "; root is refused under restricted Pod Security" if key.endswith("_id") else ""
            raise JobError(key, getattr(site, key), f"must be at least {least}{why}", "Correct the site file")


def _check_storage(site: KubernetesSite) -> None:
    if site.claim is None and site.claim_size is not None:
        raise JobError("claim_size", site.claim_size, "would be ignored: claim is null", "Name the claim too")
    if site.claim_size is not None and quantity("claim_size", site.claim_size) <= 0:
        raise JobError("claim_size", site.claim_size, "is nothing", "For example 100Gi")
    if site.claim_size is None and site.claim_storage_class is not None:
        raise JobError(
            "claim_storage_class",
            site.claim_storage_class,
            "would be ignored: the claim exists already",
            "Set claim_size to have it made, or remove this",
        )
    paths = [split_mount(text)[1] for text in site.mounts]
    for path in paths:
        if paths.count(path) > 1:
            raise JobError("mounts", path, "is mounted twice", "Remove one of them")


def _match(key: str, value: str | None, pattern: re.Pattern[str], problem: str, remedy: str) -> None:
    if value is not None and not pattern.fullmatch(value):
        raise JobError(key, value, problem, remedy)


def _check_keys(key: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise JobError(key, value, "is no mapping", "Write it in Kubernetes' own words: " + ", ".join(known))
    for name in value:
        if name not in known:
            raise JobError(f"{key}.{name}", value[name], "is unknown to Kubernetes", "It may have " + ", ".join(known))
