"""An API server in memory, for the real kubectl: it keeps objects and answers get, apply, patch, delete, wait and logs.

It checks nothing that it is sent (schemas and rules have tests of their own) and starts nothing: a test, or the
controller of this folder, plays the cluster on `objects`. What it models is the API as its concepts page has it
(kubernetes.io, reference/using-api/api-concepts).
"""

from __future__ import annotations

import copy
import json
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import fake_exec
from fake_api_discovery import RESOURCES, discover

Object = dict[str, Any]
NAMESPACE = "default"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Cluster:
    """Objects by plural and name. Whoever changes one calls `changed`, which wakes who watches."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.change = threading.Condition()
        self.version = 0
        self.requests: list[str] = []
        self.refusal: Callable[[str, str, Object | None], tuple[int, str, str] | None] = lambda *_: None
        """Asked for (method, plural, body) before anything is done: status, reason and message of a refusal."""
        self.execute: Callable[[str, str, list[str]], subprocess.Popen[bytes]] = _execute_nothing
        """Starts a program in a container of a pod."""
        self.read_log: Callable[[str, bool, str], str] = lambda pod, timestamps, since: ""

    def put(self, plural: str, value: Object) -> Object:
        """Create or replace an object."""
        with self.change:
            kind, version = RESOURCES[plural]
            value = {"apiVersion": version, "kind": kind, **value}
            metadata = value["metadata"]
            metadata.setdefault("namespace", NAMESPACE)
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", now())
            value.setdefault("status", {}) if plural in ("pods", "jobs", "jobsets") else None
            if plural == "pods":
                value["status"].setdefault("phase", "Pending")
            self.objects[plural, metadata["name"]] = value
            self.changed(value)
            return value

    def changed(self, value: Object) -> None:
        with self.change:
            self.version += 1
            value["metadata"]["resourceVersion"] = str(self.version)
            self.change.notify_all()

    def remove(self, plural: str, name: str) -> None:
        """Take an object away, and all that it owns."""
        with self.change:
            gone = self.objects.pop((plural, name), None)
            if gone is None:
                return
            for key, value in list(self.objects.items()):
                owners = value["metadata"].get("ownerReferences", [])
                if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                    self.remove(*key)
            self.version += 1
            self.change.notify_all()

    def delete(self, plural: str, name: str, foreground: bool) -> None:
        """What DELETE does: pods get their grace period, and in the foreground an owner goes after its pods."""
        value = self.objects[plural, name]
        owned = [item for item in self.objects.values() if name in _owners(item) and item["kind"] == "Pod"]
        pods = [item for item in owned if item["status"].get("phase") in ("Running", "Pending")]
        if (plural == "pods" and value["status"].get("phase") == "Running") or (foreground and pods):
            value["metadata"].setdefault("deletionTimestamp", now())
            self.changed(value)
        else:
            self.remove(plural, name)

    def select(self, plural: str, query: dict[str, str]) -> list[Object]:
        found = [value for (kind, _), value in list(self.objects.items()) if kind == plural]
        for part in filter(None, query.get("labelSelector", "").split(",")):
            key, sign, wanted = part.partition("=")
            labels = [(value, value["metadata"].get("labels", {})) for value in found]
            found = [value for value, own in labels if (own.get(key) == wanted if sign else key in own)]
        for part in filter(None, query.get("fieldSelector", "").split(",")):
            path, _, wanted = part.partition("=")
            found = [value for value in found if _at(value, path) == wanted]
        return found


def _execute_nothing(pod: str, container: str, argv: list[str]) -> subprocess.Popen[bytes]:
    raise AssertionError(f"nothing runs in {pod}")


def _owners(value: Object) -> list[str]:
    return [owner["name"] for owner in value["metadata"].get("ownerReferences", [])]


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value.get(part, {})
    return value


def merge(target: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


class Handler(BaseHTTPRequestHandler):
    """One request of kubectl."""

    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        discovery = discover(url.path)
        if discovery is not None:
            return self.answer(200, discovery)
        if "/namespaces/" not in url.path:
            return self.not_found("path", url.path)
        plural, name, rest = route(url.path)
        self.cluster.requests.append(f"GET {plural} {name} {url.query}")
        if rest == "log":
            text = self.cluster.read_log(name, query.get("timestamps") == "true", query.get("sinceTime", ""))
            return self.answer(200, text)
        if rest == "exec":
            argv = parse_qs(url.query)["command"]
            return fake_exec.serve(self, self.cluster.execute(name, query["container"], argv))
        if query.get("watch"):
            return self.watch(plural, query)
        with self.cluster.change:
            if name:
                value = self.cluster.objects.get((plural, name))
                return self.answer(200, value) if value else self.not_found(plural, name)
            items = copy.deepcopy(self.cluster.select(plural, query))
        kind, version = RESOURCES[plural]
        metadata = {"resourceVersion": str(self.cluster.version)}
        return self.answer(200, {"kind": f"{kind}List", "apiVersion": version, "metadata": metadata, "items": items})

    def do_POST(self) -> None:
        self.write("POST")

    def do_PATCH(self) -> None:
        self.write("PATCH")

    def do_DELETE(self) -> None:
        self.write("DELETE")

    def write(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or "null")
        url = urlsplit(self.path)
        plural, name, _ = route(url.path)
        self.cluster.requests.append(f"{method} {plural} {name or body['metadata']['name']} {url.query}")
        refusal = self.cluster.refusal(method, plural, body)
        if refusal is not None:
            return self.status(*refusal)
        if parse_qs(url.query).get("dryRun") == ["All"]:
            return self.answer(200, body)
        with self.cluster.change:
            value = self.cluster.objects.get((plural, name))
            if method == "POST":
                return self.answer(201, self.cluster.put(plural, body))
            if value is None:
                return self.not_found(plural, name)
            if method == "DELETE":
                self.cluster.delete(plural, name, (body or {}).get("propagationPolicy") == "Foreground")
                return self.answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})
            value.update(merge(value, body))
            self.cluster.changed(value)
            return self.answer(200, value)

    def watch(self, plural: str, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        end = time.monotonic() + min(float(query.get("timeoutSeconds", 30)), 30)
        seen: dict[str, Object] = {item["metadata"]["name"]: item for item in self.cluster.select(plural, query)}
        version = int(query.get("resourceVersion") or 0)
        try:
            while time.monotonic() < end:
                with self.cluster.change:
                    found = {item["metadata"]["name"]: item for item in self.cluster.select(plural, query)}
                    events = [("DELETED", item) for name, item in seen.items() if name not in found]
                    newer = [item for item in found.values() if int(item["metadata"]["resourceVersion"]) > version]
                    events += [("MODIFIED" if item["metadata"]["name"] in seen else "ADDED", item) for item in newer]
                    version, seen = self.cluster.version, found
                    lines = [json.dumps({"type": word, "object": item}).encode() + b"\n" for word, item in events]
                for line in lines:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
                with self.cluster.change:
                    self.cluster.change.wait(0.2)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True

    def answer(self, status: int, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def status(self, code: int, reason: str, message: str) -> None:
        body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
        self.answer(code, {**body, "message": message})

    def not_found(self, plural: str, name: str) -> None:
        self.status(404, "NotFound", f'{plural} "{name}" not found')

    def log_message(self, *_: object) -> None:
        """Quiet."""


def route(path: str) -> tuple[str, str, str]:
    """Plural, name and subresource of a path below a namespace."""
    parts = [*path.split("/namespaces/")[1].split("/")[1:], "", ""]
    return parts[0], parts[1], parts[2]


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Cluster, Path]]:
    """Serves an empty cluster on the loopback; yields it and the file to set KUBECONFIG to."""
    cluster = Cluster()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"cluster": cluster}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    config = folder / "kubeconfig"
    config.write_text(
        json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
        })
    )  # fmt: skip
    try:
        yield cluster, config
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
