"""The agent's side of the process that writes checkpoints."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from trainer.agent.checkpoint_writer import CheckpointWriter
from trainer.agent.fork_server import PROCESSES
from trainer.checkpoint.memory import Memory


def test_a_process_that_could_not_be_started_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork server was killed just then: the next round starts another, and the agent goes on."""

    class Gone:
        def __init__(self, **_: object) -> None: ...

        def start(self) -> None:
            raise EOFError

    monkeypatch.setattr(PROCESSES, "Process", Gone)
    writer = CheckpointWriter(tmp_path, Memory.make(), 0)
    with socket.socket(socket.AF_UNIX) as rank:
        rank.connect(writer.environment()["MUSTER_WRITER"])
        with pytest.raises(EOFError):
            writer.look()
    assert writer.wakes() is writer.listener
    writer.look()
    writer.close(0.0)
