"""Signals go to processes that are known to be ours: a number that was ours once may be a stranger's by now."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from muster_runs import wait_for

from trainer.agent.agent import NodeAgent
from trainer.agent.diagnosis import Diagnosis
from trainer.run.folder import RunFolder
from trainer.signals import kill_group, process_stat, send_signal, start_of


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a group of its own."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        yield process
        process.kill()


def test_the_number_alone_names_nobody(stranger: subprocess.Popen[bytes]) -> None:
    assert not send_signal(stranger.pid, "1", signal.SIGTERM)
    assert not send_signal(stranger.pid, "", signal.SIGTERM)
    assert stranger.poll() is None
    start = start_of(stranger.pid)
    assert send_signal(stranger.pid, start, signal.SIGTERM)
    assert stranger.wait(10) == -signal.SIGTERM
    assert not send_signal(stranger.pid, start, signal.SIGTERM)


@pytest.mark.parametrize("reaped", [True, False])
def test_what_an_ended_leader_left_in_its_group_is_killed(reaped: bool) -> None:
    """Also while nobody has reaped the leader, whose number is no stranger's then."""
    program = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    leader = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    wait_for("its end", lambda: process_stat(leader.pid)[:1] == ["Z"])
    if reaped:
        leader.wait()
    assert process_stat(child)[:1] not in ([], ["Z"])
    assert kill_group(leader.pid, True)
    wait_for("the end of its child", lambda: process_stat(child)[:1] in ([], ["Z"]))
    leader.communicate()


def of_ended_rank(pid: int) -> Any:
    """As `multiprocessing` describes a process that was reaped."""

    def kill() -> None:
        raise AssertionError("it has ended")

    return SimpleNamespace(pid=pid, exitcode=0, kill=kill, join=lambda timeout: None)


def test_a_stranger_with_the_number_of_an_ended_rank_gets_no_signal(
    stranger: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Neither SIGQUIT for stacks, when another rank hangs, nor SIGKILL in the end."""
    agent = NodeAgent.__new__(NodeAgent)
    agent.folder, agent.processes = tmp_path, [of_ended_rank(stranger.pid)]
    diagnosis = Diagnosis.__new__(Diagnosis)
    diagnosis.run, diagnosis.first_rank = RunFolder(tmp_path), 0
    assert diagnosis._dump_stacks(agent.processes) == {}
    agent._end_ranks()
    with pytest.raises(subprocess.TimeoutExpired):
        stranger.wait(0.2)
