"""A checkpoint that could not be loaded again is not committed."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch

from trainer.checkpoint.files import commit, committed, load
from trainer.errors import JobError


def test_what_cannot_be_loaded_is_named_when_it_is_saved(tmp_path: Path) -> None:
    payload = {"model.pt": {"weight": torch.ones(1)}, "state.pt": {"optimizer": deque([1])}}
    with pytest.raises(JobError, match=r"train\.optimizer='collections\.deque': the state of the optimizer holds it"):
        commit(tmp_path, 1, payload, {}, 0, prove=True)
    assert list(committed(tmp_path)) == []
    payload["model.pt"]["grid"] = torch.eye(2).to_sparse()
    payload["model.pt"]["phase"] = torch.ones(1, dtype=torch.complex64)
    payload["state.pt"] = {}
    folder = commit(tmp_path, 1, payload, {}, 0, prove=True)
    assert load(folder, "model.pt")["grid"].to_dense().sum() == 2
