"""`muster logs` on Kubernetes: what pods print comes from the cluster, what ranks write lies on its side."""

from __future__ import annotations

import shutil
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


def test_a_ranks_log_comes_from_its_pod(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The API server in memory starts nothing in pods, so a kubectl that stands before the real one does."""
    run = submit(tmp_path, None)
    for node, mark in enumerate(("aaaaa", "bbbbb")):
        put_pod(cluster, run, node, mark, **RUNNING)
    log, shim = tmp_path / "rank-1.log", tmp_path / "bin" / "kubectl"
    shim.parent.mkdir()
    exec_ = f"exec {run.name}-1-bbbbb --container=agent -- tail"
    shim.write_text(
        f'#!/bin/sh\ncase "$*" in\n"{exec_} --bytes=+"*" /runs/{run.name}/logs/rank-1.log") exec tail "$6" {log} ;;\n'
        f'exec*) exit 1 ;;\nesac\nexec {shutil.which("kubectl")} "$@"\n'
    )
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(shim.parent), prepend=":")
    for text in ("a\r", "bär\n"):  # as it is, though somebody reads while a character is being written
        for part in (text.encode()[:2], text.encode()[2:]):
            with log.open("ab") as file:
                file.write(part)
            capfd.readouterr()
            control.logs(str(run), 1, False)
    assert (run / "logs/rank-1.log").read_bytes() == "a\rbär\n".encode()
    assert "bär" in capfd.readouterr().out
