"""Fixtures of the Kubernetes tier: an API server in memory, which the real kubectl talks to, and pods that run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine
from engine_image import Image
from fake_api_server import Cluster, serving
from fake_job_controller import Pods
from paths import ROOT
from pod_runs import Runs


@pytest.fixture
def kubectl() -> str:
    """The command, which is not on every machine."""
    found = shutil.which("kubectl")
    if found is None:
        pytest.skip("there is no kubectl: install kubernetes-client or kubectl")
    return found


@pytest.fixture
def cluster(kubectl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """An empty cluster that kubectl, and so muster, finds as its current one."""
    with serving(tmp_path) as (found, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setenv("KUBECACHEDIR", str(tmp_path / "cache"))  # of discovery, else kept at home for each port
        monkeypatch.chdir(ROOT)
        yield found


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site file for run folders on a volume that the nodes share."""
    path = tmp_path / "site.yaml"
    path.write_text("claim: runs\n")
    return path


@pytest.fixture
def pods(cluster: Cluster, engine: Engine, image: Image, tmp_path: Path) -> Iterator[Pods]:
    """A cluster whose pods run."""
    playing = Pods(engine, image.tag, cluster, tmp_path / "volumes")
    yield playing
    playing.close()


@pytest.fixture
def runs(pods: Pods, tmp_path: Path) -> Runs:
    return Runs(pods, tmp_path)
