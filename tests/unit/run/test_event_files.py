"""Events that several machines write, each into a file of its own, and what else may lie in such files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paths import ROOT

from trainer.records import append_line, read_lines
from trainer.run import event_files
from trainer.run.folder import RunFolder
from trainer.run.log_tail import EventTail


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(event_files, "_nodes", [])
    monkeypatch.setattr(event_files, "_newest", {})
    return RunFolder.create(str(tmp_path), "digits", "name: digits\n")


def names(run: RunFolder) -> list[str]:
    return [event["event"] for event in run.read_events()]


def as_machine(monkeypatch: pytest.MonkeyPatch, name: str, node: int | None, ahead_s: float = 0.0) -> None:
    """Go on as a process of another machine, whose clock is wrong."""
    monkeypatch.setattr(event_files, "_machine", lambda: name)
    monkeypatch.setattr(event_files, "_nodes", [] if node is None else [node])
    monkeypatch.setattr(event_files, "_newest", {})
    monkeypatch.setattr(event_files.time, "time", lambda now=time.time: now() + ahead_s, raising=True)


def test_each_machine_writes_a_file(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS two that append to one file overwrite each other."""
    for node in (0, 1):
        with monkeypatch.context() as patch:
            as_machine(patch, f"host{node}", node)
            run.record("preflight", node=node)
    found = [path.name for path in run.event_files()]
    assert found[0].startswith("launch-") and found[1:] == ["node-0-host0.jsonl", "node-1-host1.jsonl"]
    assert names(run) == ["submitted", "preflight", "preflight"]
    assert [event["event"] for event in run.read_main_events()] == ["submitted", "preflight"]


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
def test_clocks_that_differ_do_not_turn_cause_and_effect_round(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    for attempt in range(2):
        with monkeypatch.context() as patch:
            as_machine(patch, f"host{attempt}", 0, ahead_s)
            run.record("attempt", attempt=attempt)
            run.record("ended", node=0, code=1)
        with monkeypatch.context() as patch:
            as_machine(patch, "login", None)
            run.record("continued")
    assert names(run) == ["submitted", *["attempt", "ended", "continued"] * 2]
    texts = sorted(line for path in run.event_files() for line in path.read_text().splitlines())
    assert [json.loads(line)["event"] for line in texts] == names(run), "so `sort events/*` shows them in order"


def test_a_clock_that_is_set_back_changes_no_order(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.record("pending", reason="x")
    monkeypatch.setattr(event_files.time, "time", lambda: 5.0)
    run.record("requeued", launch=1)
    assert names(run) == ["submitted", "pending", "requeued"]


def test_a_clock_that_was_a_year_ahead_dates_nothing_else(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(event_files, "_newest", {})
        patch.setattr(event_files.time, "time", lambda now=time.time: now() + 365 * 86400)
        run.record("pending", reason="x")
    monkeypatch.setattr(event_files, "_newest", {})
    run.record("requeued", launch=1)
    assert names(run) == ["submitted", "pending", "requeued"]
    times = [event["time"] for event in run.read_events()]
    assert times == sorted(times) and times[-1] - times[0] < 60 and abs(times[-1] - time.time()) < 60


def test_a_run_of_an_older_version_is_read_and_continued(run: RunFolder) -> None:
    for path in run.event_files():
        path.unlink()
    run.events.rmdir()
    old = [{"event": "submitted", "time": 5}, {"event": "training", "time": 9.5, "step": 0}]
    run.old_events.write_text("".join(json.dumps(event) + "\n" for event in old))
    assert run.exists() and RunFolder.list_all(run.path.parent) == [run]
    run.record("continued")
    assert names(run) == ["submitted", "training", "continued"]
    assert len(run.old_events.read_text().splitlines()) == 2


RUBBISH = [
    b"[" * 100_000, b"\0\0\0\0", b"\xff\xfe\xfa", b'"text"', b"17", b"null", b'{"event": 5, "time": 1}', b"{}",
    b'{"event": "x"}', b'{"event": "x", "time": "soon"}', b'{"event": "x", "time": NaN}',
    b'{"event": "x", "time": true}',
    b'{"event": "x", "time": 1e300}', b'{"event": "x", "time": 1' + b"0" * 400 + b"}", b'{"event": "x", "time": -1}',
    b'{"event": "x", "time": 1e999}', b'{"time": ' + b"9" * 5000 + b"}", b'{"event": "training", "ti', b"\r", b"",
]  # fmt: skip


@pytest.mark.parametrize("rubbish", RUBBISH, ids=range(len(RUBBISH)))
def test_what_is_no_event_spoils_nothing(run: RunFolder, rubbish: bytes) -> None:
    """Neither before a line, as zeros after a power loss, nor after it, as half a line where the disk was full."""
    tail = EventTail(run)
    (file,) = run.event_files()
    for _ in range(2):
        with file.open("ab") as handle:
            handle.write(rubbish)
        run.record("requeued", launch=1)
    assert names(run) == ["submitted", "requeued", "requeued"]
    assert [event["event"] for event in tail.events(last=True)] == ["requeued", "requeued"]


def test_zeros_before_a_line_do_not_take_it_along(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"one": 1}\n' + b"\0" * 4096 + b'{"two": 2}\n')
    assert read_lines(file) == [{"one": 1}, {"two": 2}]


def test_a_torn_line_is_lost_alone(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    append_line(file, {"one": 1})
    with file.open("ab") as handle:
        handle.write(b'{"two": ')
    append_line(file, {"three": 3})
    append_line(file, {"four": 4})
    assert read_lines(file) == [{"one": 1}, {"three": 3}, {"four": 4}]
    assert read_lines(file, 24) == [{"three": 3}, {"four": 4}][-1:]


def test_processes_and_threads_do_not_mix_lines(run: RunFolder) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom trainer.run.folder import RunFolder\n"
        "for launch in range(300):\n    RunFolder(Path(sys.argv[1])).record('requeued', launch=launch)\n"
    )
    command = [sys.executable, "-c", program, str(run)]
    others = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda: [run.record("requeued", launch=launch) for launch in range(300)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in others] == [0, 0]
    assert len(run.read_events()) == 1 + 4 * 300
