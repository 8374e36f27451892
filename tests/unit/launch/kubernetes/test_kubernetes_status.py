"""What is kept of a run's end on Kubernetes, where the objects of ended jobs are removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.launch.kubernetes.platform import Kubernetes
from trainer.launch.platform import JobStatus, Phase
from trainer.records import write_json
from trainer.run.folder import RunFolder


@pytest.mark.parametrize("key", ["phase", "word"])
def test_an_end_that_is_kept_is_read_without_a_cluster(tmp_path: Path, key: str) -> None:
    """Version 0.1 called the phase a word."""
    run = RunFolder(tmp_path)
    write_json(run.exit, {key: "stopped", "reason": "stopped at time_limit_min", "code": 75})
    status = Kubernetes().status(run, {})
    assert status == JobStatus(Phase.STOPPED, "stopped at time_limit_min", 75)
    assert (f"{status.phase}", status.is_active) == ("stopped", False)
