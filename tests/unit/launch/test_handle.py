"""What a handle names becomes words of scancel, kubectl and kill: a file must not be able to make options of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.errors import JobError
from trainer.launch import control
from trainer.launch.handle import read_handle
from trainer.launch.platform import REGISTRY
from trainer.records import write_json
from trainer.run.folder import RunFolder

GOOD: dict[str, dict[str, Any]] = {
    "local": {"pid": 1, "started": "17"},
    "docker": {"pid": 1, "started": ""},
    "slurm": {"job_id": "8_0"},
    "kubernetes": {"kind": "jobs.batch", "name": "digits-1128-1a2b", "context": None, "namespace": "team"},
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(str(tmp_path), "digits", "name: digits\n")


@pytest.mark.parametrize("platform", REGISTRY)
def test_what_a_platform_gave_is_taken(platform: str, run: RunFolder) -> None:
    write_json(run.handle, {"platform": platform, **GOOD[platform]})
    assert read_handle(run) == {"platform": platform, **GOOD[platform]}


@pytest.mark.parametrize(
    ("platform", "key", "value"),
    [
        ("local", "pid", -1), ("local", "pid", 0), ("docker", "pid", "1; reboot"), ("local", "started", "--"),
        ("slurm", "job_id", "--user=victim"), ("slurm", "job_id", ""), ("slurm", "job_id", "8,9"),
        ("slurm", "job_id", "8\n"), ("slurm", "job_id", None), ("slurm", "job_id", "٨"),
        ("kubernetes", "kind", "secrets"), ("kubernetes", "name", "--all"), ("kubernetes", "name", "a/b"),
    ],
)  # fmt: skip
def test_all_else_is_refused_before_any_command(platform: str, key: str, value: object, run: RunFolder) -> None:
    write_json(run.handle, {"platform": platform, **GOOD[platform], key: value})
    for act in (control.cancel, control.preempt, control.status):
        with pytest.raises(JobError, match=rf"handle\.json says {key}=.*, which {platform} never gave"):
            act(str(run))
    (listed,) = control.list_all(run.path.parent)
    assert listed["state"] == "unknown" and "never gave" in listed["reason"]
