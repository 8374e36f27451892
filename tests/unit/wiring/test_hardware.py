"""Processors of a container: its limit counts, not the host's number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.wiring.hardware import free_memory, usable_processors


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu.max": "nonsense"}, 64),
    ],
)
def test_the_limit_of_a_container_counts(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    count, source = usable_processors(tmp_path, tmp_path / "no such file")
    assert count == expected
    assert ("limit" in source) == (expected < 64)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        # A unit of systemd, a Slurm step, a nested container: the limit is not the root's.
        ("0::/user.slice/run-1.scope\n", {"user.slice/run-1.scope/cpu.max": "300000 100000"}, 3),
        ("0::/user.slice/run-1.scope\n", {"user.slice/cpu.max": "200000 100000",
                                          "user.slice/run-1.scope/cpu.max": "max 100000"}, 2),
        ("0::/a/b/c\n", {"a/cpu.max": "500000 100000", "a/b/c/cpu.max": "800000 100000"}, 5),
        ("0::/a\n", {"b/cpu.max": "100000 100000"}, 64),
        # v1 mounts `cpu` alone or with `cpuacct`; a hybrid host has v2 beside it.
        ("12:cpuset:/x\n4:cpu,cpuacct:/slurm/uid_0/job_7\n0::/\n",
         {"cpu/slurm/uid_0/job_7/cpu.cfs_quota_us": "600000", "cpu/slurm/uid_0/job_7/cpu.cfs_period_us": "100000"}, 6),
        ("4:cpu,cpuacct:/slurm/step_0\n",
         {"cpu,cpuacct/slurm/cpu.cfs_quota_us": "150000", "cpu,cpuacct/slurm/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
        ("0::/a\n", {"unified/a/cpu.max": "700000 100000"}, 7),
        # A container that sees the path of its host: only its own root is mounted.
        ("4:cpu:/docker/0123\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("0::/../../other\n", {"cpu.max": "400000 100000"}, 4),
    ],
)  # fmt: skip
def test_so_does_one_of_a_cgroup_below_the_root(
    own: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert usable_processors(tmp_path / "root", tmp_path / "own")[0] == expected


V2 = ("memory.max", "memory.current", "file 300\nshmem 100\n")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache 300\ntotal_shmem 100\n")


@pytest.mark.parametrize("names, limit, expected", [
    (V2, "1000", 600), (V2, "max", 2048), (V2, "400", 0), (V1, "1000", 600), (V1, "9223372036854771712", 2048),
])  # fmt: skip
def test_free_memory_counts_cached_files_and_not_shared_memory(
    tmp_path: Path, names: tuple[str, str, str], limit: str, expected: int
) -> None:
    """600 bytes are in use; those of files can be had back, but for the shared ones."""
    root = tmp_path / "root"
    folder = root if names is V2 else root / "memory"
    folder.mkdir(parents=True)
    for name, text in zip((*names[:2], "memory.stat"), (limit, "600", names[2]), strict=True):
        (folder / name).write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 2 kB\n")
    assert free_memory(root, tmp_path / "own", tmp_path / "meminfo") == expected
