"""Fixtures of the gloo tier."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agents_peer import JOB, free_port

from trainer.agent.kv_server import KeyValueServer


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make a file system of a given size, to fill it for real."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip("needs root, to mount a tmpfs and fill it for real")
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode:
            pytest.skip("this container may not mount a tmpfs to fill")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def served() -> Iterator[tuple[KeyValueServer, int]]:
    """What node 0's agent serves for three nodes, and its port."""
    server = KeyValueServer(JOB, 3)
    yield server, server.listen(["127.0.0.1"], [free_port()])
    server.close(linger_s=0)
