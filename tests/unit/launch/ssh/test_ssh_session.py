"""How a conversation with another machine is begun and kept: connections, log-in shells, slow lines."""

import os
import pwd
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.errors import JobError
from trainer.launch.ssh import connection, session, there


def program(folder: Path, text: str, name: str = "ssh") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_long_answer_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is counted from the last byte."""
    out, into = os.pipe()
    other = session.Session.__new__(session.Session)
    other.host, other.buffer, other.chatter, other.mark = "far", b"", b"", b"@m@"
    monkeypatch.setattr(session, "SILENCE_S", 0.7)

    def speak() -> None:
        os.write(into, b'@m@{"text": "')
        for _ in range(10):
            time.sleep(0.1)
            os.write(into, b"a")
        os.write(into, b'"}\n')

    with os.fdopen(out, "rb", buffering=0) as file:
        other.process = SimpleNamespace(stdout=file)  # type: ignore[assignment]
        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        assert other._line() == {"text": "a" * 10}
        speaker.join()
        with pytest.raises(JobError, match="said nothing for"):
            other._line()
    os.close(into)


def test_a_log_in_that_leaves_something_running_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the output open; and where a shell shows nothing, that is said."""
    account = SimpleNamespace(pw_shell=str(tmp_path / "shell"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: account)
    monkeypatch.setenv("FROM_PROFILE", "before")
    said: list[str] = []
    for text in ('sleep 10 &\nexport FROM_PROFILE=1\nshift\nexec sh "$@"', "exit 0"):
        program(tmp_path, text, "shell")
        host = there.There.__new__(there.There)
        host.has_login, host.mark = False, "\n@m@"
        monkeypatch.setattr(host, "say", lambda note: said.append(note))
        began = time.monotonic()
        host._log_in()
        assert time.monotonic() - began < 9 and os.environ["FROM_PROFILE"] == "1"
    assert len(said) == 1 and "does not show its environment" in said[0]


def test_files_at_home_are_not_taken_for_pythons_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of ssh starts there, and a json.py may lie there. By an ssh that leads to this machine."""
    home = tmp_path / "home"
    home.mkdir()
    program(tmp_path / "bin", f'for last; do :; done; case "$*" in *" -T -- "*) cd {home}; exec sh -c "$last";; esac')
    for name in ("json", "gzip", "tarfile", "hashlib"):
        (home / f"{name}.py").write_text("raise SystemExit(9)\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    place = session.Place(connection.Connection("far"), str(tmp_path / "muster"), sys.executable)
    host = session.Session(place)
    assert host.request("has_code", name="0" * 16) == {"found": False}
    host.close()


def test_connections_at_once_are_made_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise all but one are shared with nobody, and stay."""
    made = tmp_path / "made"
    program(tmp_path, f'case "$*" in *check*) exec test -e {made};; *-N*) sleep 0.3; echo 1 >>{made};; esac')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: connection.Connection("a").open(), range(3)))
    assert made.read_text() == "1\n"


def test_a_configuration_that_ssh_refuses_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ssh is asked for."""
    program(tmp_path, 'echo "config: line 1: Bad configuration option: x" >&2; exit 255')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(JobError, match="refuses its configuration"):
        connection.Connection("a").open()
