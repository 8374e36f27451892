"""What a run writes down: events, metrics, TensorBoard scalars, samples, the result. Append only, one line each."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.wiring.variables import termination_log


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line with one write, so that lines of several processes never mix."""
    line = json.dumps(value, default=_plain) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def record_event(run: Path, event: str, **facts: Any) -> None:
    """Append to `events.jsonl`: what happened, when (seconds since 1970), and its facts."""
    append_line(run / "events.jsonl", {"event": event, "time": round(time.time(), 3), **facts})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that was cut off by a full disk or a power loss is left out."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    values = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            values.append(value)
    return values


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole."""
    pending = path.with_name(f".{path.name}.{os.getpid()}")
    pending.write_text(json.dumps(value, indent=1, default=_plain) + "\n")
    pending.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; None when it is not there or not whole."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def tell_platform(text: str) -> None:
    """Leave the last word where the platform shows it: Kubernetes' termination message (at most 4096 bytes)."""
    path = termination_log()
    if path:
        with contextlib.suppress(OSError):
            path.write_bytes(text.encode()[:4000])


class Metrics:
    """The scalars of rank 0: `metrics.jsonl`, and TensorBoard's event files when asked for."""

    def __init__(self, run: Path, attempt: int, step: int, tensorboard: bool) -> None:
        """`step`: steps done before; TensorBoard drops what a dead attempt wrote beyond it."""
        self.file = (run / "metrics.jsonl").open("a", buffering=1)
        self.attempt, self.step = attempt, step
        self.folder = run / "tensorboard" if tensorboard else None
        self.board: Any = None

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write the values of one step; `kind` is train or evaluation."""
        line = {"kind": kind, "step": step, "attempt": self.attempt, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(line) + "\n")
        if self.folder is None:
            return
        if self.board is None:  # here, not at import: it costs 0.1 s that the first step need not wait for
            self.board = Board(self.folder, self.step)
        self.board.write(step, {f"{kind}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """No more events."""
        self.file.close()
        if self.board is not None:
            self.board.close()


class Board:
    """TensorBoard's event file: one event for all scalars of a step, written here.

    torch's SummaryWriter makes one for each, and hands them to a thread that competes for the interpreter: 140
    microseconds of a 2 ms step.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """`step`: steps done before."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = Event, Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self.file = (folder / name).open("wb", buffering=0)  # a write for each event: a kill loses none
        self.records = RecordWriter(self.file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if step:  # what a dead attempt wrote from here on is dropped
            self._write(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The scalars of a step."""
        scalars = [self.summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(self.event(wall_time=time.time(), step=step, summary=self.summary(value=scalars)))

    def _write(self, event: Any) -> None:
        self.records.write(event.SerializeToString())

    def close(self) -> None:
        """No more events."""
        self.file.close()


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
