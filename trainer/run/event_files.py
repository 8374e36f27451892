"""The files of a run's events: one for each writer, read as one.

Machines that append to one file overwrite each other on NFS, where an append is a look at the size, then a write. So
each has a file of its own, `events/<part>-<machine>.jsonl`. A part is `launch` (whoever submits and supervises) or
`node-<rank>`. A machine is a running kernel: a host that died and its successor may have one name.

Clocks of machines differ. An event is never dated before one that its writer can know of, so that what follows from
another event also comes after it: the submitting side and node 0 look at each other's files, and at their own.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from trainer.records import is_number, read_lines

Event = dict[str, Any]
LAUNCH = "launch"
MAIN = (LAUNCH, "node-0")
"""The parts that tell how a run goes. What other nodes say matters when it has failed."""
MOST = 8 << 20
"""What is read of a file, from its end: some 40,000 events."""
MOST_OF_OTHERS = 64 << 10
"""The same for nodes other than 0, of which there may be a thousand."""
TICK_S = 0.001
AHEAD_S = 86400.0
"""No clock is believed to be further ahead: it was wrong for a while, or the line is none of ours."""

_nodes: list[int] = []
_newest: dict[Path, float] = {}


def write_as(node: int) -> None:
    """From here on this process writes as a part of a node: it is its agent, or one of its ranks."""
    _nodes[:] = [node]


def own_file(folder: Path) -> Path:
    """The file that this process writes to."""
    part = f"node-{_nodes[0]}" if _nodes else LAUNCH
    return folder / f"{part}-{_machine()}.jsonl"


@cache
def _machine() -> str:
    """This machine's name, and part of the random number that its kernel made when it started."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:  # a sandbox without it
        boot = "0"
    return f"{re.sub('[^A-Za-z0-9]+', '-', socket.gethostname())}-{boot}"


def make_event(folder: Path, old: Path, name: str, fields: Event) -> Event:
    """An event that happens now; `old`: see `files`. The time comes first, so that `sort events/*` shows the order."""
    if folder not in _newest:
        _newest[folder] = _time_of_last(folder, old)
    _newest[folder] = round(max(time.time(), _newest[folder] + TICK_S), 3)
    return {"time": _newest[folder], "event": name, **fields}


def _time_of_last(folder: Path, old: Path) -> float:
    newest, latest = 0.0, time.time() + AHEAD_S
    with contextlib.suppress(OSError):
        for path in files(folder, old, MAIN):
            times = (event["time"] for event in _events(path, MOST_OF_OTHERS))
            newest = max((when for when in times if newest < when <= latest), default=newest)
    return newest


def files(folder: Path, old: Path, parts: Iterable[str] = ()) -> list[Path]:
    """The files of some parts, or of all; first `old`, the one file of older versions, if it is there."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    wanted = tuple(f"{part}-" for part in parts)
    found = [folder / name for name in names if name.endswith(".jsonl") and name.startswith(wanted or "")]
    return [old, *found] if old.exists() else found


def read(folder: Path, old: Path, parts: Iterable[str] = ()) -> list[Event]:
    """The events of some parts, or of all, in the order of their times; in one file, in that of its lines."""
    dated: list[tuple[float, Event]] = []
    latest = time.time() + AHEAD_S
    for path in files(folder, old, parts):
        is_main = path == old or path.name.startswith(MAIN)
        events = _events(path, MOST if is_main else MOST_OF_OTHERS)
        reached = next((event["time"] for event in events if event["time"] <= latest), None)
        for event in events:
            if reached is not None:
                if event["time"] > latest:
                    event["time"] = reached
                reached = max(reached, event["time"])  # somebody may have set the clock back
            dated.append((event["time"] if reached is None else reached, event))
    return [event for _, event in sorted(dated, key=lambda pair: pair[0])]


def _events(path: Path, most: int) -> list[Event]:
    return [line for line in read_lines(path, most) if is_event(line)]


def is_event(line: dict[str, Any]) -> bool:
    """Whether a line is an event, of whatever kind, and not something else that got there."""
    when = line.get("time")
    return is_number(when) and 0 <= when < 1 << 40 and isinstance(line.get("event"), str)
