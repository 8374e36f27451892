"""GPU leases: no device twice, all or none, inside the mask, free again when the holder is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import Job
from trainer.errors import JobError
from trainer.launch import lease
from trainer.launch.lease import try_lease, visible_devices, wanted_devices

FOUR = ["0", "1", "2", "3"]


def job(**keys: object) -> Job:
    return Job(task="a:B", parallel="ddp", **keys)  # type: ignore[arg-type]


def test_two_jobs_get_different_devices_and_a_third_waits(tmp_path: Path) -> None:
    first, second = try_lease(2, FOUR, tmp_path), try_lease(2, FOUR, tmp_path)
    assert first is not None and second is not None
    assert (first.devices, second.devices) == (["0", "1"], ["2", "3"])
    assert try_lease(1, FOUR, tmp_path) is None
    first.release()
    third = try_lease(1, FOUR, tmp_path)
    assert third is not None and third.devices == ["0"]


def test_too_few_are_none_at_all(tmp_path: Path) -> None:
    held = try_lease(["2"], FOUR, tmp_path)
    assert held is not None
    assert try_lease(4, FOUR, tmp_path) is None
    rest = try_lease(3, FOUR, tmp_path)
    assert rest is not None and rest.devices == ["0", "1", "3"]


def test_named_devices_keep_their_order(tmp_path: Path) -> None:
    found = try_lease(["2", "3", "1"], FOUR, tmp_path)
    assert found is not None and found.devices == ["2", "3", "1"]


def test_a_lease_ends_with_all_who_hold_it(tmp_path: Path) -> None:
    """With the supervisor and the agents that it handed its files to, however they end."""
    found = try_lease(1, ["0"], tmp_path)
    assert found is not None
    agent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=found.handles)
    found.release()
    assert try_lease(1, ["0"], tmp_path) is None
    agent.kill()
    agent.wait()
    assert try_lease(1, ["0"], tmp_path) is not None


@pytest.mark.parametrize(
    ("mask", "expected"), [(None, FOUR), ("2,3", ["2", "3"]), ("", []), (" 3 , 1", ["3", "1"])]
)  # fmt: skip
def test_only_what_the_mask_shows(mask: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "gpu_files", lambda: [f"nvidia{number}" for number in FOUR])
    if mask is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert visible_devices() == expected


def test_a_mask_without_a_gpu_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "gpu_files", list)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_devices() == []


@pytest.mark.parametrize(
    ("keys", "visible", "expected"),
    [
        ({"devices_per_node": 2}, FOUR, 2),
        ({"devices_per_node": 2, "nodes": 2}, FOUR, 4),
        ({"devices_per_node": 2}, [], 0),
        ({"devices_per_node": 8}, FOUR, 0),
        ({"devices_per_node": 2, "device": "cpu"}, FOUR, 0),
        ({"devices_per_node": 3, "devices": [2, 3, 1]}, FOUR, ["2", "3", "1"]),
    ],
)
def test_what_a_job_wants(keys: dict[str, object], visible: list[str], expected: object) -> None:
    assert wanted_devices(job(**keys), visible) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"devices_per_node": 8, "device": "cuda"}, r"devices_per_node=8: 8 GPUs are needed .* shows 4"),
        ({"devices_per_node": 1, "devices": [7]}, r"devices=\[7\]: this machine shows 0, 1, 2, 3"),
    ],
)
def test_what_a_machine_cannot_give_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        wanted_devices(job(**keys), FOUR)
