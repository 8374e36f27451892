"""`muster logs` on Kubernetes: what pods print comes from the cluster, what ranks write lies on its side."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_api_server import Cluster
from kubernetes_runs import RUNNING, put_pod, submit

from trainer.errors import JobError
from trainer.launch import control


def test_logs_need_no_status_before(cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = submit(tmp_path, None)
    put_pod(cluster, run, 0, "aaaaa", **RUNNING)
    cluster.read_log = lambda *_: "2026-01-01T00:00:01Z [muster] hello\n"
    capfd.readouterr()
    control.logs(str(run), None, False)
    assert capfd.readouterr().out == "[muster] hello\n"
    with pytest.raises(JobError, match=rf"--rank=1: has no log here.*{run.name}/logs/rank-1\.log"):
        control.logs(str(run), 1, False)
