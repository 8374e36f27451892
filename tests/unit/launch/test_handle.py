"""What a handle names becomes words of scancel, kubectl and kill: a file must not be able to make options of them."""

from __future__ import annotations

import os
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


def test_the_short_name_of_a_kind_is_one(run: RunFolder) -> None:
    write_json(run.handle, {"platform": "kubernetes", **GOOD["kubernetes"], "kind": "job"})
    assert (read_handle(run) or {})["kind"] == "job"


def test_who_only_looks_writes_nothing_into_what_others_may_write(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Kubernetes, a look copies logs; a log may be a link to a file of whoever looks."""
    write_json(run.handle, {"platform": "kubernetes", **GOOD["kubernetes"]})
    (tmp_path / "kubectl").write_text("#!/bin/sh\ntouch $0.was.asked; exit 1\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run.path.chmod(0o775)
    assert control.status(str(run))["state"] == "unknown" and not (tmp_path / "kubectl.was.asked").exists()
    run.path.chmod(0o755)
    control.status(str(run))
    assert (tmp_path / "kubectl.was.asked").exists()


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
