"""A rank that is stopped is the one that hangs, however short a time its agent saw it silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.agent import diagnosis
from trainer.agent.diagnosis import Diagnosis
from trainer.config.job import Job
from trainer.reporting.heartbeat import Heartbeat
from trainer.run.folder import RunFolder

DEAF = f"import signal; signal.signal({int(signal.SIGQUIT)}, signal.SIG_IGN); print(flush=True); signal.pause()"


@pytest.mark.parametrize("stopped", [[], [1], [0, 1]])
def test_another_node_found_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[int]) -> None:
    """The agent's own clock stood still meanwhile: by it both ranks have just given signs of life."""
    monkeypatch.setattr(diagnosis, "STACKS_S", 0.1)
    heartbeat, run = Heartbeat(tmp_path / "heartbeat", 2), RunFolder(tmp_path)
    wiring: Any = SimpleNamespace(node_rank=0, hostnames=["host"])
    run.logs.mkdir()
    found = Diagnosis(Job(task="a:B", devices_per_node=2), run, wiring, heartbeat, tmp_path)
    ranks = [subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for index, rank in enumerate(ranks):
            assert rank.stdout is not None and rank.stdout.readline()
            heartbeat.beat(index, 7, "training")
        for index in stopped:
            os.kill(ranks[index].pid, signal.SIGSTOP)
            os.waitid(os.P_PID, ranks[index].pid, os.WSTOPPED | os.WNOWAIT)
        processes = [SimpleNamespace(pid=rank.pid, exitcode=None) for rank in ranks]
        failure = found.find_hung(processes, 0.0, alarmed=True)
        named = None if failure is None else (failure.rank, failure.kind, "(the process is stopped)" in failure.message)
        assert named == ((stopped[0], "hung", True) if stopped else None)
        assert found.find_hung(processes, 0.0) is None, "nobody missed anything here"
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
