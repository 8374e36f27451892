"""Files of JSON: lines that several processes append to, and objects that are replaced as a whole.

Whatever lies in such a file can be read: a line that is none of ours, or not whole, is left out, and only that one.
"""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from trainer.wiring.variables import TERMINATION_LOG, read_path

NOT_OURS = ArithmeticError, AttributeError, LookupError, TypeError, ValueError
"""What is raised where a value that is none of ours is used as one of ours: it lacks fields, or has other types."""


def to_line(value: Mapping[str, Any]) -> bytes:
    """A value as a line of a file."""
    return json.dumps(value, default=_plain).encode() + b"\n"


def for_programs(value: Any) -> str:
    """A value as JSON of which any program can make something: null where Python would write NaN or Infinity."""
    return json.dumps(json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None))


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line with one write, so that lines of several processes of a machine never mix.

    Raises OSError: it was not written, or only a part of it, which spoils no other line.
    """
    handle = open_lines(path)
    try:
        write_line(handle, to_line(value))
    finally:
        os.close(handle)


def open_lines(path: Path) -> int:
    """Open a file of lines, to be appended to."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def write_line(handle: int, line: bytes) -> None:
    """Append a line. Where somebody's disk was full, the file may end in the middle of one: then begin a new one."""
    size = os.fstat(handle).st_size
    rest = b"\n" + line if size and os.pread(handle, 1, size - 1) != b"\n" else line
    while rest:
        try:
            rest = rest[os.write(handle, rest) :]
        except OSError:
            if rest != b"\n":  # without its end the line is whole
                raise
            return


def read_lines(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Read a file of JSON lines, or those in its last `most` bytes; none when it is not there."""
    return parse_lines(read_end(path, most).split(b"\n"))


def read_end(path: Path, most: int | None = None) -> bytes:
    """The lines in the last `most` bytes of a file, without one that begins before; nothing when it is not there."""
    try:
        with path.open("rb") as file:
            begin = max(0, os.fstat(file.fileno()).st_size - most - 1) if most is not None else 0
            file.seek(begin)
            data = file.read()
    except FileNotFoundError:
        return b""
    return data.partition(b"\n")[2] if begin else data


def parse_lines(lines: Iterable[bytes | str]) -> list[dict[str, Any]]:
    """The objects in JSON lines. A power loss leaves zeros before a line, a full disk half of one."""
    values = []
    for line in lines:
        text = line if isinstance(line, str) else line.decode(errors="replace")
        with contextlib.suppress(ValueError, RecursionError):
            values.append(json.loads(text.strip("\0\r ")))
    return [value for value in values if isinstance(value, dict)]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether somebody can calculate with a value: JSON also knows integers of any length."""
    return isinstance(value, float) or (isinstance(value, int) and is_count(abs(value)) and not isinstance(value, bool))


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value can be a number of steps or the like."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def write_json(path: Path, value: Mapping[str, Any], sync: bool = True) -> None:
    """Replace a JSON file as a whole, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, default=_plain) + "\n", sync)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """Replace a file as a whole; with `sync` for good: its content reaches the disk before its name does."""
    pending = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}")
    try:
        with pending.open("w") as file:
            file.write(text)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        pending.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            pending.unlink()
        raise
    if sync:
        with contextlib.suppress(OSError):
            sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have a folder's names on the disk, where the file system can do that for folders; mounts of others refuse."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; None when it is not there or not whole."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
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
