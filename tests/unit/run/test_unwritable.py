"""What a run observes, while its disk is full or its server is gone: nothing raises, nothing is lost silently."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from muster_runs import wait_for
from paths import ROOT

from trainer.records import read_json, read_lines, write_json
from trainer.reporting.metrics import TensorBoard, make_sinks
from trainer.run import line_file
from trainer.run.folder import RunFolder
from trainer.run.line_file import LineFile


class Disk:
    """What writing to it fails with, and after how many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.problem, self.room = folder, 0, 0
        self.write, self.open = os.write, os.open
        monkeypatch.setattr(os, "write", self._write)
        monkeypatch.setattr(os, "open", self._open)

    def _write(self, handle: int, data: Any) -> int:
        here = os.readlink(f"/proc/self/fd/{handle}").startswith(str(self.folder))
        if not (self.problem and here):
            return self.write(handle, data)
        if self.room:
            self.room = 0
            return self.write(handle, bytes(data)[:7])
        raise OSError(self.problem, os.strerror(self.problem))

    def _open(self, path: Any, *args: Any, **options: Any) -> int:
        if self.problem == errno.ESTALE and str(path).startswith(str(self.folder)):
            raise OSError(self.problem, os.strerror(self.problem))
        return self.open(path, *args, **options)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch, tmp_path)


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EACCES])
def test_lines_wait_and_follow(
    disk: Disk, tmp_path: Path, problem: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = LineFile(tmp_path / "metrics.jsonl", retry_s=0)
    file.write({"step": 1})
    disk.problem, disk.room = problem, 1
    for step in (2, 3):
        file.write({"step": step})
    disk.problem = 0
    file.write({"step": 4})
    assert [line["step"] for line in read_lines(file.path)] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and "can be written again; 0 lines are lost" in said
    disk.problem = problem
    monkeypatch.setattr(line_file, "KEPT", 2)
    file._close()
    for step in range(5, 10):
        file.write({"step": step})
    file.close()
    assert "5 lines could not be written and are lost" in capsys.readouterr().err


def test_the_last_line_follows_although_nothing_else_is_written(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_file, "LEAST_RETRY_S", 0.02)
    file = LineFile(tmp_path / "node-0.jsonl", retry_s=0, stays_open=False)
    disk.problem = errno.ENOSPC
    file.write({"event": "restart"})
    time.sleep(0.1)  # several tries
    assert read_lines(file.path) == []
    disk.problem = 0
    wait_for("the line", lambda: read_lines(file.path) == [{"event": "restart"}], 5)


def test_an_event_that_cannot_be_written_is_printed_and_follows(
    disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(str(tmp_path), "digits", "name: digits\n")
    disk.problem = errno.ENOSPC
    run.record("requeued", launch=1)
    assert "'requeued'" in capsys.readouterr().err
    disk.problem = 0
    run.record("requeued", launch=2)
    assert [event.get("launch") for event in run.read_events()] == [None, 1, 2]


def test_sinks_never_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """TensorBoard's thread ends with the first error; another writer takes over, and hides nothing."""
    run = RunFolder.create(str(tmp_path), "digits", "name: digits\n")
    monkeypatch.setattr("trainer.reporting.metrics.RETRY_S", 0.0)
    monkeypatch.setattr("trainer.reporting.metrics.EVERY_S", 0.0)
    sinks = make_sinks(run, 0, 0, True)
    (board,) = [sink for sink in sinks if isinstance(sink, TensorBoard)]
    made, broken = [], [True]

    class Writer:
        def __init__(self, folder: str, purge_step: int | None, flush_secs: int) -> None:
            made.append(purge_step)
            self.file_writer = self

        def add_summary(self, *args: object) -> None:
            if broken:
                raise OSError(errno.EIO, "Input/output error")

        flush = close = add_summary

    board.make_writer = Writer  # type: ignore[assignment]
    for step in (1, 2):
        for sink in sinks:
            sink.write(step, "evaluation", {"accuracy": step / 2})
            sink.flush()
    broken.clear()
    for sink in sinks:
        sink.write(3, "train", {"loss": 1.0})
        sink.close()
    assert made[0] == 1 and set(made[1:]) == {None} and not board.waiting
    assert capsys.readouterr().err.count("misses values") == 1
    assert [line["step"] for line in read_lines(run.metrics)] == [1, 2, 3]
    assert read_json(run.evaluation) == {"step": 2, "attempt": 0, "accuracy": 1.0}


def test_a_file_is_replaced_as_a_whole_and_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content before name, name before return: else a power loss leaves an empty file."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append("rename"), replace(path, to))[1])
    write_json(tmp_path / "exit.json", {"code": 0})
    assert ".exit.json." in done[0] and done[1:] == ["rename", str(tmp_path)]
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_json(tmp_path / "exit.json", {"code": 1})
    assert read_json(tmp_path / "exit.json") == {"code": 0} and os.listdir(tmp_path) == ["exit.json"]


def test_what_is_printed_never_ends_a_process() -> None:
    """Not onto a full disk, nor into a pipe that nobody reads; how much is missing is said when there is room again."""
    program = (
        "import os, sys\nfrom trainer.run.output import never_fail\nnever_fail()\n"
        "full, kept = os.open('/dev/full', os.O_WRONLY), os.dup(1)\n"
        "os.dup2(full, 1)\nprint('lost')\nos.dup2(kept, 1)\nprint('shown')\n"
        "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 2)\nprint('nobody', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n[muster] 5 bytes of this log could not be written\nshown\n"
