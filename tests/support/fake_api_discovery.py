"""What the API server in memory serves, and what it answers when kubectl asks for that before anything else."""

from __future__ import annotations

from typing import Any

# Plural: kind, group and version.
RESOURCES = {
    "pods": ("Pod", "v1"),
    "services": ("Service", "v1"),
    "configmaps": ("ConfigMap", "v1"),
    "secrets": ("Secret", "v1"),
    "events": ("Event", "v1"),
    "persistentvolumeclaims": ("PersistentVolumeClaim", "v1"),
    "jobs": ("Job", "batch/v1"),
    "networkpolicies": ("NetworkPolicy", "networking.k8s.io/v1"),
    "jobsets": ("JobSet", "jobset.x-k8s.io/v1alpha2"),
}
DESCRIBED = dict(RESOURCES)  # stays complete when a test takes a resource away
VERBS = ["create", "delete", "get", "list", "patch", "watch"]


def discover(path: str) -> Any:
    """What kubectl asks before anything else: groups, resources, and whether fields are validated here."""
    groups = sorted({version for _, version in RESOURCES.values() if "/" in version})
    if path == "/version":
        return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = [{"groupVersion": group, "version": group.split("/")[1]} for group in groups]
        items = [
            {"name": each["groupVersion"].split("/")[0], "versions": [each], "preferredVersion": each}
            for each in listed
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": items}
    if path.startswith("/api/v1/namespaces/") and path.count("/") == 4:
        return {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": path.rpartition("/")[2]}}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version in [*groups, "v1"] and path.startswith("/api"):
        resources = [
            {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": True, "verbs": VERBS}
            for plural, (kind, group) in RESOURCES.items() if group == version
        ]  # fmt: skip
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
    if path == "/openapi/v3":
        return {"paths": {f"api{'s' if '/' in group else ''}/{group}": {"serverRelativeURL": f"/openapi/v3/{group}"}
                          for group in {version for _, version in DESCRIBED.values()}}}  # fmt: skip
    if path.startswith("/openapi/v3/"):
        return describe_patches(path.removeprefix("/openapi/v3/"))
    return None


def describe_patches(version: str) -> Any:
    """Says of each kind that PATCH takes `fieldValidation`: kubectl then leaves validation to the server."""
    group, _, last = version.rpartition("/")
    paths = {}
    for plural, (kind, of) in DESCRIBED.items():
        if of == version:
            operation = {
                "x-kubernetes-group-version-kind": {"group": group, "version": last, "kind": kind},
                "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
                "responses": {},
            }
            paths[f"/{plural}/{{name}}"] = {"patch": operation}
    return {"openapi": "3.0.0", "info": {"title": "test", "version": "0"}, "paths": paths}
