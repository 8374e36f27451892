"""From a plan to manifests: the templates of `k8s/` with OmegaConf's `${...}` filled in. Pure; nothing is submitted."""

import base64
import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.load import read_sections
from trainer.errors import FAILED, STOPPED, WRONG_JOB, JobError
from trainer.launch.kubernetes.code import ARCHIVE, MOUNT, Code
from trainer.launch.kubernetes.site import KubernetesSite, check_fit, split_mount
from trainer.launch.platform import Plan
from trainer.launch.site import fabric_environment, template
from trainer.run.folder import RunFolder

GRACE_MARGIN_S = 15
"""From the agent's own bound to the kubelet's kill: ranks are ended, the last word is written."""
INSTANCE = "app.kubernetes.io/instance"
"""The label that all objects of one submission carry, with their name; the claim does not."""
LONGEST_LABEL = 63
"""Characters of a DNS label (RFC 1035): host names, pod names and Services are such."""
LABELS = ("app.kubernetes.io/name", INSTANCE)
"""What all objects of a job have."""
SECRET_KEY = "secret"
"""Under which the run's secret is in its Secret."""
TEXT_MAPS = ("labels", "annotations", "matchLabels", "nodeSelector", "data")
"""Mappings whose values the API takes as strings only."""


def make_manifests(plan: Plan[KubernetesSite], code: Code | None = None) -> list[dict[str, Any]]:
    """Make what the Job needs, then the Job; `code`: what travels with it, None: it is in the image.

    Raises JobError: the site cannot hold it, or a template is wrong.
    """
    site = plan.site
    check_fit(site, plan.job)
    claim = [] if site.claim_size is None else ["claim"]
    workload = ["jobset"] if site.kind == "jobset" else ["service", "job"]
    names = ["networkpolicy", *claim, "configmap", *workload]
    templates = {name: read_sections(template("k8s", f"{name}.yaml")) for name in ["pod", *names]}
    values = _escape(_values(plan) | _code_values(plan, code))
    _add_extras(templates["pod"]["template"]["spec"], site)
    _drop(templates, code)
    templates["networkpolicy"]["spec"]["egress"] += _escape(site.egress)
    for name in names:
        templates[name]["metadata"]["namespace"] = site.namespace
    try:
        config = OmegaConf.create({**values, "pod": templates["pod"], "k8s": templates})
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        name, _, key = str(getattr(error, "full_key", None) or "?").partition(".")
        problem = " ".join(str(error).split("\n")[0].split())
        remedy = "A template may use job.*, site.* and the names that the other templates use"
        raise JobError(f"k8s/{name}.yaml", key, problem, remedy) from None
    manifests = [_clean(resolved["k8s"][name]) for name in names]
    maps = names.index("configmap")
    return [*manifests[:maps], *_code_maps(manifests[maps], code), *manifests[maps:]]


def object_name(plan: Plan[KubernetesSite]) -> str:
    """The name of the plan's objects: its run folder's as a DNS label, with room for what is appended to it.

    By hand, where there is no run folder yet, the job's name alone: the same objects every time.
    """
    run = run_name(plan)
    kept = re.sub(r"[^a-z0-9-]+", "-", run.lower()).strip("-")
    name = kept if kept[:1].isalpha() else f"m-{kept}".rstrip("-")  # a Service's name begins with a letter
    suffix = f"-node-0-{plan.job.nodes - 1}-12345"  # of a JobSet's pods, the longest of all
    room = LONGEST_LABEL - len(suffix)
    if len(name) > room:
        digest = hashlib.sha256(run.encode()).hexdigest()[:8]
        name = f"{name[: room - 9].rstrip('-')}-{digest}"
    return name


def run_name(plan: Plan[KubernetesSite]) -> str:
    """The run folder's name on the claim."""
    return plan.run.name.removesuffix("-ID")  # what `muster render` puts where `submit` puts a time


def _values(plan: Plan[KubernetesSite]) -> dict[str, Any]:
    """What templates may name: the job, the site, and what follows from both; null leaves a key out."""
    job, site, name = plan.job, plan.site, object_name(plan)
    stem = f"{name}-node-0" if site.kind == "jobset" else name
    resources = {"cpu": site.cpu, "memory": site.memory, **site.resources}
    if site.gpu is not None and job.device != "cpu":
        resources[site.gpu] = str(job.devices_per_node)
    spread = {
        "maxSkew": 1, "topologyKey": site.spread, "whenUnsatisfiable": site.spread_policy,
        "labelSelector": {"matchLabels": {INSTANCE: name}},
    }  # fmt: skip
    return {
        "job": dataclasses.asdict(job),
        "site": {key: None if value in ([], {}) else value for key, value in dataclasses.asdict(site).items()},
        "name": name, "run": run_name(plan),
        "hostnames": ",".join(f"{stem}-{index}.{name}" for index in range(job.nodes)),
        "job_yaml": plan.job_text,
        "exit_code": {"wrong_job": WRONG_JOB, "stopped": STOPPED, "failed": FAILED},
        "grace_s": math.ceil(job.agent.grace_s) + GRACE_MARGIN_S,
        # Without a claim nothing is left of progress when pods are lost.
        "kills": job.agent.restarts if site.claim is None else job.agent.restarts_total,
        "time_limit_s": site.time_limit_min * 60, "keep_finished_s": site.keep_finished_min * 60,
        "suspend": True if site.queue else None, "resources": resources,
        "spread": [spread] if site.spread and job.nodes > 1 else None,
        "image_pull_secrets": [{"name": name} for name in site.image_pull_secrets] or None,
        "secrets": [{"secretRef": {"name": name}} for name in site.secrets] or None,
        "secret": _secret_source(plan, name),
        "by_hand": int(not plan.run.source.exists()), "run_shared": int(site.claim is not None),
        "claim": {"claimName": site.claim} if site.claim else None, "no_claim": None if site.claim else {},
    }  # fmt: skip


def _code_values(plan: Plan[KubernetesSite], code: Code | None) -> dict[str, Any]:
    """What the templates say about the code of the run."""
    if code is None:
        return {"code": None}
    mount, files = {"name": "archive", "mountPath": str(ARCHIVE)}, [f"{ARCHIVE}/{key}" for key in code.parts()]
    if not code.fits:
        mount, files = {"name": "runs", "mountPath": "/runs"}, [str(archive_on_claim(plan))]
    data = {"job.yaml": "job.yaml", "unpack.py": "unpack.py", "source.json": "plan/source.json"}
    return {"code": {
        "folder": str(MOUNT), "command": ["python3", "-I", "/etc/muster/unpack.py", code.sha256, str(MOUNT), *files],
        "unpack": Path(__file__).with_name("unpack.py").read_text(), "mount": {**mount, "readOnly": True},
        "source": json.dumps({"working_directory": str(MOUNT), "job_folder": str(code.folder)}) + "\n",
        "items": [{"key": key, "path": path} for key, path in data.items()],
        "sources": [{"configMap": {"name": name}} for name in _map_names(object_name(plan), code)],
        "limits": {"cpu": plan.site.cpu, "memory": plan.site.memory},
    }}  # fmt: skip


def archive_on_claim(plan: Plan[KubernetesSite]) -> Path:
    """Where a run's code lies on its claim, as the pods see it, when it is too large for ConfigMaps."""
    return RunFolder(Path("/runs", run_name(plan))).code_archive


def _map_names(name: str, code: Code) -> list[str]:
    """By the hash: a node that still has a ConfigMap of an earlier submission must not take it for this one."""
    return [f"{name}-code{part}-{code.sha256[:8]}" for part in range(len(code.parts()))]


def _code_maps(config: dict[str, Any], code: Code | None) -> list[dict[str, Any]]:
    """The ConfigMaps of the code, which say the same of themselves as that of the job."""
    if code is None or not code.fits:
        return []
    names = _map_names(config["metadata"]["name"], code)
    return [
        {**{field: value for field, value in config.items() if field != "data"},
         "metadata": {**config["metadata"], "name": name}, "binaryData": {key: base64.b64encode(part).decode()}}
        for name, (key, part) in zip(names, code.parts().items(), strict=True)
    ]  # fmt: skip


def _drop(templates: dict[str, Any], code: Code | None) -> None:
    """Take out of the templates what this run does not need: all about code that is in the image, or its ConfigMaps.

    Raises JobError: the templates are older than code that travels.
    """
    pod, data = templates["pod"]["template"]["spec"], templates["configmap"]["data"]
    agent, first = pod["containers"][0], pod.get("initContainers", [])
    if code is not None and not any(each["name"] == "code" for each in first):
        remedy = "Copy the lines about the code from Muster's own k8s/pod.yaml, or set code: image in the site file"
        raise JobError("k8s/pod.yaml", "initContainers", "has no container that unpacks the run's code", remedy)
    gone = ["archive", "code"] if code is None else [] if code.fits else ["archive"]
    pod["volumes"] = [each for each in pod["volumes"] if each["name"] not in gone]
    if code is None:
        agent["volumeMounts"] = [each for each in agent["volumeMounts"] if each["name"] not in gone]
        pod["initContainers"] = [each for each in first if each["name"] != "code"] or None
        agent["workingDir"] = None
        templates["configmap"]["data"] = {key: value for key, value in data.items() if key == "job.yaml"}
        for each in pod["volumes"]:
            each.get("configMap", {}).pop("items", None)


def _secret_source(plan: Plan[KubernetesSite], name: str) -> dict[str, Any]:
    """Where the pods find the run's secret: in the Secret that `submit` makes; by hand, where nobody makes one, the
    Job's uid, which nobody can guess, and only who may look at the namespace's Jobs can see.
    """
    if plan.run.source.exists():
        return {"secretKeyRef": {"name": name, "key": SECRET_KEY}}
    return {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}}


def secret_object(job: dict[str, Any], text: str = "") -> dict[str, Any]:
    """The Secret that the pods of a Job or JobSet refer to; it is never rendered. Without `text`, what names it."""
    metadata = {key: job["metadata"][key] for key in ("name", "namespace") if key in job["metadata"]}
    metadata["labels"] = {key: job["metadata"]["labels"][key] for key in LABELS}
    content = {"immutable": True, "stringData": {SECRET_KEY: text}} if text else {}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, **content}


def _escape(value: Any) -> Any:
    """Keep `${...}` inside values, such as a job's own, from being filled in (OmegaConf's escape)."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list) else value


def _add_extras(pod: dict[str, Any], site: KubernetesSite) -> None:
    """Append the site's own tolerations, variables and claims to the lists of the template."""
    container = pod["containers"][0]
    theirs = {each.get("key") for each in site.tolerations}  # of two for one taint, the shorter would count
    pod["tolerations"] = [each for each in pod["tolerations"] if each["key"] not in theirs] + _escape(site.tolerations)
    own = {**fabric_environment(site.fabric), **site.env}
    container["env"] += [{"name": name, "value": _escape(value)} for name, value in own.items()]
    for index, text in enumerate(site.mounts):
        claim, path, read_only = split_mount(text)
        name, options = f"mount-{index}", {"readOnly": True} if read_only else {}
        pod["volumes"].append({"name": name, "persistentVolumeClaim": {"claimName": claim, **options}})
        container["volumeMounts"].append({"name": name, "mountPath": _escape(path), **options})


def _clean(value: Any, key: str = "", parent: str = "") -> Any:
    """Leave out keys that came out as null, and write numbers as text where the API takes nothing else."""
    if isinstance(value, dict):
        return {name: _clean(item, name, key) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_clean(item, key, parent) for item in value]
    is_text = parent in TEXT_MAPS or (parent, key) == ("env", "value")
    return str(value).lower() if is_text and not isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Block style, as manifests are written by hand: indented lists, literal blocks, doubtful words quoted.

    Equal parts are written out: kubectl reads anchors, people do not.
    """

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


PLAIN = re.compile(r"[A-Za-z/]([\w./@+()|:,-]*[\w./@+()|-])?( [\w./@+()|-]+)*|\d+[KMGTPE]i")
RESERVED = re.compile(r"(?i:y|n|yes|no|on|off|true|false|null)")


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote what some YAML reader takes for a number or a boolean: kubectl's and Python's disagree on 1e3 and on."""
    plain = PLAIN.fullmatch(text) and not RESERVED.fullmatch(text)
    style = "|" if "\n" in text else None if plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def render_manifests(manifests: list[dict[str, Any]]) -> str:
    """Manifests as one YAML stream."""
    return str(yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)).rstrip("\n")
