"""The Makefile's targets for Kubernetes, by hand: what they send is what `muster render` prints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fake_api_server import Cluster
from paths import ROOT

INSTANCE = {"app.kubernetes.io/instance": "digits"}


def make(target: str, *words: str) -> str:
    """What a target prints; the environment is there, so it is not made again."""
    command = ["make", "--silent", "--assume-old=setup", target, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_apply_logs_and_delete(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    site = tmp_path / "my site.yaml"
    site.write_text(f"kind: {kind}\n")
    words = (f"SITE={site}", "ARGS=nodes=2 device=cpu")
    make("k8s-apply", *words)
    assert (f"{kind}s", "digits") in cluster.objects
    running = {"phase": "Running", "containerStatuses": [{"name": "agent", "state": {"running": {}}}]}
    for node in (0, 1):
        metadata = {"name": f"digits-{node}-abcde", "labels": INSTANCE}
        spec = {"containers": [{"name": "agent"}]}
        cluster.put("pods", {"metadata": metadata, "spec": spec, "status": running})
    cluster.read_log = lambda pod, timestamps, since: f"hello from {pod}\n"
    printed = make("k8s-logs", *words)
    for node in (0, 1):
        assert f"hello from digits-{node}-abcde" in printed
    for node in (0, 1):
        cluster.remove("pods", f"digits-{node}-abcde")
    for name, instance in (("digits-code0-0123abcd", "digits"), ("other-code0-0123abcd", "other")):
        labels = {"app.kubernetes.io/instance": instance}  # of code that was edited since
        cluster.put("configmaps", {"metadata": {"name": name, "labels": labels}})
    make("k8s-delete", *words)
    assert list(cluster.objects) == [("configmaps", "other-code0-0123abcd")]
    cluster.objects.clear()
    make("k8s-delete", *words)  # what is gone already is no error
