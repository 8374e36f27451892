"""The end of a script: its last checkpoint is tried until it is there, as a task's is."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import muster
from trainer.checkpoint import writer
from trainer.checkpoint.memory import Memory
from trainer.run.folder import RunFolder


@pytest.mark.parametrize("begun", [True, False])
def test_the_last_checkpoint_of_a_script_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """The disk is full when the last epoch ends: the state is in memory alone, so the session may not end yet."""
    for name in ("MUSTER_SESSION", "MUSTER_WRITER", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    memory = Memory.make()  # as under an agent
    for name, value in memory.environment().items():
        monkeypatch.setenv(name, value)
    commit, tries = writer.files.commit, []

    def commit_later(root: Path, *arguments: Any) -> Path:
        tries.append(root)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return commit(root, *arguments)

    monkeypatch.setattr(writer.files, "commit", commit_later)
    with muster.Session(tmp_path / "run", device="cpu") as session:
        model = session.wrap(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.track(model=model, optimizer=optimizer)
        for _ in session.epochs(1):
            for [features] in session.batches(TensorDataset(torch.ones(4, 2)), batch_size=2) if begun else ():
                model(features).sum().backward()
                optimizer.step()
        run = RunFolder(session.run)
    assert run.steps_committed() == (2 if begun else 0) and len(tries) == 3
    assert run.result.exists()
