"""An environment of Python on another machine: made there once for all runs with the same requirements.

Runs before anything is installed there, so it imports nothing but Python's own modules.
"""

import fcntl
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

COMPLETE = "complete"
"""The file that an environment has once everything is in it. Without it, pip goes on where it was interrupted."""
SAID = ("Collecting ", "Downloading ", "Installing ", "Building ")
Say = Callable[..., None]


def make_environment(path: str, wanted: dict[str, str], say: Say) -> None:
    """Make the environment, or wait for the process that does. Exits: it cannot be made; `say` has told why."""
    place = Path(path)
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(note=f"another process is making {place}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: pip says if two are in each other's way
            pass
        if (place / COMPLETE).exists():
            return
        say(note=f"making {place}: this happens once, and may take minutes")
        if not (place / "bin" / "pip").exists():
            _run([sys.executable, "-I", "-m", "venv", "--clear", str(place)], place, say)
        pip = [str(place / "bin" / "python"), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        for name, text in wanted.items():
            (place / name).write_text(text)
        # Complete and with hashes, so nothing else is looked for. The other packages are checked by version alone.
        _run([*pip, "--no-deps", "--require-hashes", f"--requirement={place / 'locked.txt'}"], place, say)
        if wanted["others.txt"].strip():
            _run([*pip, f"--requirement={place / 'others.txt'}"], place, say)
        (place / COMPLETE).touch()


def _run(command: Sequence[str], place: Path, say: Say) -> None:
    """Run a command, and pass on what it does."""
    said: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in map(str.strip, process.stdout):
            said = [*said[-20:], line] if line else said
            if line.startswith(SAID):
                say(note=line)
    if process.returncode:
        errors = [line for line in said if line.startswith(("ERROR", "Error")) or "apt install" in line]
        say(error="environment", text=f"{place} cannot be made: {' '.join(errors[:2] or said[-1:])}"[:600])
        raise SystemExit(1)
