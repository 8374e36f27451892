"""An agent's folder: what killed agents and loader workers left is removed, and nothing of anybody who lives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.agent.health import check_health
from trainer.agent.scratch_folder import (
    SHM,
    agent_folders,
    folder_prefix,
    own_folder,
    remove_leftovers,
    shorten_temporary_folder,
)
from trainer.errors import JobError
from trainer.reporting.heartbeat import HEARTBEAT

MAKE_ONE = """
import sys
from trainer.agent.scratch_folder import own_folder
with own_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""
"""The life of an agent, as far as its folder is concerned; it ends with its standard input."""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, for this process and those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


def start(*before: str) -> tuple[subprocess.Popen[str], Path]:
    """An agent in a process of its own, and its folder."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", MAKE_ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_folder_goes_with_its_agent(temporary: Path) -> None:
    process, folder = start()
    assert folder.is_dir() and folder.parent == temporary
    process.communicate("")
    assert not folder.exists()


def test_what_a_killed_agent_left_is_removed_by_the_next(temporary: Path) -> None:
    killed, left = start()
    living, kept = start()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.exists()
    with own_folder() as folder:
        assert not left.exists()
        assert {path for path, alive in agent_folders() if alive} == {kept, folder}
    living.communicate("")
    assert not list(temporary.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a PID namespace")
def test_agents_of_containers_that_share_a_folder_let_each_other_alone(temporary: Path) -> None:
    """Neither finds the other's process in /proc."""
    with own_folder() as folder:
        inside, other = start("unshare", "--pid", "--fork", "--mount-proc")
        assert other.is_dir() and folder.is_dir(), "the one inside removed the one outside"
        with own_folder():
            assert other.is_dir(), "the one outside removed the one inside"
        assert other not in [path for path, _ in agent_folders()]
        inside.communicate("")
        assert not other.exists()


@pytest.mark.parametrize("prefix", ["muster-agent-", "muster-agent-another-host-", "muster-agent-9999999-"])
def test_folders_of_others_stay(temporary: Path, prefix: str) -> None:
    """Of another host, another boot, or an older version."""
    other = temporary / f"{prefix}9999999-abc"
    other.mkdir()
    assert not folder_prefix().endswith(prefix)
    with own_folder():
        assert other.exists()


def test_health_looks_at_living_agents_alone(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed, left = start()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.exists() and check_health() == 1
    with own_folder() as folder:
        (folder / HEARTBEAT).touch()
        assert check_health() == 0
    assert capsys.readouterr().out.splitlines() == ["no agent runs here", "1 agent(s) well"]


def test_what_killed_workers_left_in_shared_memory_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / f"worker-{process.pid}").touch()
    left, *others = (SHM / f"torch_{pid}_7_{os.getpid()}" for pid in (process.pid, os.getpid(), f"{process.pid}0"))
    try:
        for path in (left, *others):
            path.write_bytes(b"batch")
        remove_leftovers(tmp_path)
        assert not left.exists() and all(path.exists() for path in others)
        assert not list(tmp_path.iterdir())
    finally:
        for path in (left, *others):
            path.unlink(missing_ok=True)


def test_a_long_folder_gets_a_short_name(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets below it have paths of at most 107 bytes; files go where the user wants them all the same."""
    shorten_temporary_folder()
    assert os.environ["TMPDIR"] == str(temporary), "a short one stays"
    long = temporary / ("d" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    for _ in range(2):  # the second agent finds the link of the first
        tempfile.tempdir = None
        shorten_temporary_folder()
        link = Path(os.environ["TMPDIR"])
        assert len(str(link)) < 40 and link.resolve() == long
        monkeypatch.setenv("TMPDIR", str(long))
    try:
        with own_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder.parent / "pymp-abcdefgh-listener-abcdefgh"))
            assert len(list(long.iterdir())) == 2
        link.unlink()
        link.symlink_to("/somewhere/else")  # of somebody who was here first
        tempfile.tempdir = None
        shorten_temporary_folder()
        assert Path(os.environ["TMPDIR"]).parent == Path("/var/tmp")
        Path(os.environ["TMPDIR"]).unlink()
        monkeypatch.setenv("TMPDIR", str(long))
        monkeypatch.setattr("trainer.agent.scratch_folder.SHORT", ("/proc",))
        tempfile.tempdir = None
        with pytest.raises(JobError, match=r"TMPDIR='.*ddd.*: has more than 73 characters"):
            shorten_temporary_folder()
    finally:
        link.unlink()


def test_no_folder_for_temporary_files(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError("No usable temporary directory found in ['/nowhere']")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    with pytest.raises(JobError, match=r"TMPDIR=.*No usable temporary directory.*may write to"):
        shorten_temporary_folder()
