"""A node that dies: its pod stays, nobody can say what it does, and its log does not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_api_server import Cluster
from kubernetes_runs import RUNNING, put_pod, submit

from trainer.launch import control
from trainer.launch.kubernetes import pod_logs

LINE = "2026-01-01T00:00:01Z step 7/9  epoch 1  loss 2\n"


@pytest.fixture
def hanging(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Pods whose logs do not come, as from a kubelet that does not answer; the others print one line."""
    monkeypatch.setattr(pod_logs, "LOGS_S", 1.0)
    monkeypatch.setattr(pod_logs, "LOG_S", 2.0)
    pods: list[str] = []
    over = threading.Event()

    def read_log(pod: str, timestamps: bool, since: str) -> str:
        if pod in pods:
            over.wait(30)
        return LINE

    cluster.read_log = read_log
    yield pods
    over.set()


def test_the_state_comes_though_a_dead_nodes_log_does_not(
    cluster: Cluster, tmp_path: Path, site: Path, hanging: list[str]
) -> None:
    run = submit(tmp_path, site)
    put_pod(cluster, run, 0, "aaaaa", **RUNNING)
    pod = put_pod(cluster, run, 1, "bbbbb", **RUNNING)
    pod["spec"]["nodeName"] = "worker-7"
    hanging.append(pod["metadata"]["name"])
    assert control.status(str(run))["state"] == "running"
    end = time.monotonic() + 60
    while (found := control.status(str(run)))["step"] is None:  # from the second time on, each pod is asked by itself
        assert found["state"] == "running"
        assert time.monotonic() < end, "the log of the other pod does not come"  # a loaded machine may need some tries
    assert (found["state"], found["reason"], found["step"]) == ("running", "step 7/9  epoch 1  loss 2", 7)
    pod["status"]["conditions"] = [{"type": "Ready", "status": "False"}]  # the control plane has noticed it
    found = control.status(str(run))
    for word in ("node worker-7 does not answer", pod["metadata"]["name"], "out-of-service=nodeshutdown:NoExecute"):
        assert word in found["reason"]
    assert not (run / "logs/node-1.log").exists()
    hanging.clear()
    pod["status"]["conditions"] = []
    while not (run / "logs/node-1.log").exists():
        control.status(str(run))
        assert time.monotonic() < end, "the log that was behind does not come"
    assert (run / "logs/node-1.log").read_text() == (run / "logs/node-0.log").read_text()
