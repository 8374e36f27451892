"""The Kubernetes platform's site: `k8s/site.yaml` as a dataclass, with checks of what the API server accepts.

The API server itself checks the rest before anything is created: `kubectl apply --dry-run=server` comes first.
"""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from trainer.config.job import Job
from trainer.errors import JobError
from trainer.launch.site import check_rules
from trainer.wiring.hardware import WORKER_SHM_MB

OBJECT = re.compile(r"[a-z0-9][a-z0-9.-]{,252}")
"""An object's name. Pods that refer to another are accepted, and never start."""
IMAGE = re.compile(r"[a-z0-9]\S*")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
POWERS = {"m": -1, "": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
CODE = ("auto", "snapshot", "image")
OURS = re.compile(
    r"(MUSTER|TORCHELASTIC)_\w+|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|HOME|TMPDIR|"
    r"JOB_COMPLETION_INDEX|CUDA_VISIBLE_DEVICES"
)
"""Variables that Muster sets in the pods."""
PATHS = ("/", "/archive", "/code", "/dev/shm", "/etc/muster", "/runs", "/tmp")
MARGIN = 2**30
"""Bytes that a pod needs beside its shared memory: the interpreters and torch of the agent and its ranks."""


@dataclass
class KubernetesSite:
    """`k8s/site.yaml`: see there for what each key means."""

    context: str | None = None
    namespace: str | None = None
    kind: str = "job"
    image: str = "muster"
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: list[str] = field(default_factory=list)
    code: str = "auto"
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

    def check(self) -> None:
        """Refuse values with which pods would be wrong or never start. Raises JobError: there are some."""
        names = [("claim", self.claim)]
        names += [(key, name) for key in ("secrets", "image_pull_secrets") for name in getattr(self, key)]
        check_rules([
            *((name is not None and not OBJECT.fullmatch(name), key, name, "is not a valid object name",
               "Use a-z, 0-9, '-' and '.'") for key, name in names),
            *((bool(OURS.fullmatch(name)), f"env.{name}", value, "is set by Muster itself", "Remove it")
              for name, value in self.env.items()),
            *((name in ("cpu", "memory", self.gpu), f"resources.{name}", value, "has a key of its own",
               "Set cpu, memory or gpu; the number of GPUs comes from the job")
              for name, value in self.resources.items()),
            (self.kind not in ("job", "jobset"), "kind", self.kind, "must be one of job, jobset", "Choose one of them"),
            (self.code not in CODE, "code", self.code, f"must be one of {', '.join(CODE)}", "Choose one of them"),
            (not IMAGE.fullmatch(self.image), "image", self.image, "is not a valid image name",
             "For example registry.example/team/muster:1"),
            (self.spread is None and self.spread_policy != "ScheduleAnyway", "spread_policy", self.spread_policy,
             "would be ignored, because spread is null", "Remove it, or set spread"),
            (self.claim is None and self.claim_size is not None, "claim_size", self.claim_size,
             "would be ignored, because claim is null", "Set claim too"),
            (self.claim_size is None and self.claim_storage_class is not None, "claim_storage_class",
             self.claim_storage_class, "would be ignored, because the claim exists already",
             "Set claim_size to have the claim made, or remove this"),
            (quantity("memory", self.memory) < quantity("shm", self.shm) + MARGIN, "memory", self.memory,
             f"does not cover shm={self.shm}, which counts against it, and 1Gi to run in",
             "Raise memory, or lower shm"),
            (self.user_id < 1, "user_id", self.user_id, "must be at least 1: pods must not run as root", "Correct it"),
            (self.time_limit_min < 1, "time_limit_min", self.time_limit_min, "must be at least 1", "Correct it"),
            (self.keep_finished_min < 1, "keep_finished_min", self.keep_finished_min,
             "must be at least 1: an ended Job says how the run ended, and muster has to see it", "Correct it"),
        ])  # fmt: skip
        for text in self.mounts:
            split_mount(text)


def check_fit(site: KubernetesSite, job: Job) -> None:
    """Raises JobError: this site's pods have no GPUs, or too little shared memory for the loader workers of the job."""
    needed = job.data.workers * job.ranks_per_node * WORKER_SHM_MB * 2**20 if job.task else 0
    check_rules([
        (job.device == "cuda" and site.gpu is None, "device", job.device,
         "the site file names no GPU resource", "Set gpu in the site file, for example nvidia.com/gpu, or device=cpu"),
        (quantity("shm", site.shm) < needed, "shm", site.shm,
         f"{job.data.workers} loader workers for each of {job.ranks_per_node} ranks may need {needed >> 20}Mi",
         "Raise shm, and memory with it, in the site file, or lower data.workers"),
    ])  # fmt: skip


def quantity(key: str, text: str) -> Decimal:
    """A Kubernetes quantity as a number. Raises JobError: it is not one."""
    match = QUANTITY.fullmatch(text)
    if match is None:
        raise JobError(key, text, "is not a Kubernetes quantity", "For example 500m, 2, 512Mi or 64Gi")
    digits, unit = match.groups("")
    return Decimal(digits) * Decimal(1024 if unit.endswith("i") else 1000) ** POWERS[unit[:1]]


def split_mount(text: str) -> tuple[str, str, bool]:
    """Claim, path and whether it is read-only. Raises JobError: not claim:/path[:ro], or it would hide our folders."""
    claim, _, rest = text.partition(":")
    path, _, option = rest.partition(":")
    well_formed = OBJECT.fullmatch(claim) and path.startswith("/") and option in ("", "ro")
    check_rules([
        (not well_formed, "mounts", text, "is not claim:/path or claim:/path:ro", "For example data:/data:ro"),
        ((path.rstrip("/") or "/") in PATHS, "mounts", text, f"Muster itself uses {path}",
         "Mount it elsewhere, for example at /data"),
    ])  # fmt: skip
    return claim, path, option == "ro"
