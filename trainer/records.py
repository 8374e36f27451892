"""Files of JSON: lines that several processes append to, and objects that are replaced as a whole."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.wiring.variables import TERMINATION_LOG, read_path


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line with one write, so that lines of several processes never mix."""
    line = json.dumps(value, default=_plain) + "\n"
    with open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
        file.write(line.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; none when it is not there."""
    return parse_lines(path.read_text(errors="replace").splitlines() if path.exists() else ())


def parse_lines(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The objects in JSON lines; one that was cut off by a full disk or a power loss is left out."""
    values = []
    for line in lines:
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


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
    path = read_path(TERMINATION_LOG)
    if path:
        with contextlib.suppress(OSError):
            path.write_bytes(text.encode()[:4000])


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
