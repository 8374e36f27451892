"""What is made of kubectl's own words."""

import os
from pathlib import Path

import pytest

from trainer.errors import JobError
from trainer.launch.kubernetes.kubectl import Kubectl


def test_advice_that_leads_astray_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kubectl says so where no API server answers."""
    said = 'error: error validating "STDIN": failed to download openapi: connection refused'
    program = tmp_path / "kubectl"
    advice = "; if you choose to ignore these errors, turn validation off with --validate=false"
    program.write_text(f"#!/bin/sh\necho '{said}{advice}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    kubectl = Kubectl({"context": None, "namespace": None, "kind": "job", "name": "x"})
    with pytest.raises(JobError) as refused:
        kubectl.run_or_raise("apply", "--filename=-")
    assert str(refused.value).endswith(
        f"refused: {said}. Check `kubectl cluster-info`, and context and namespace in the site file"
    )
