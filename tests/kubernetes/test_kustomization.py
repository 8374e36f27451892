"""`kubectl apply -k k8s`, which needs nothing of ours: it makes the objects of the example."""

from __future__ import annotations

import subprocess

import yaml
from paths import ROOT


def kinds(text: str) -> list[str]:
    return sorted(document["kind"] for document in yaml.safe_load_all(text))


def test_the_kustomization_builds(kubectl: str) -> None:
    done = subprocess.run([kubectl, "kustomize", "k8s"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kinds(done.stdout) == kinds((ROOT / "k8s/examples/digits.yaml").read_text())
