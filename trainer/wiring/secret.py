"""A run's secret, by which its agents know each other: where it is found, and how it is made.

Whoever can read it belongs to the run. Ranks and user code do not need it, so reading it takes it out of the
environment that they inherit.
"""

import os
import re
import secrets
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from trainer.errors import JobError
from trainer.wiring.variables import SECRET, SECRET_FILE, run_is_shared

FORM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
"""What we make, or the uid of a Kubernetes Job, which all its pods are given and nobody can choose."""
BEGUN = re.compile(r"[0-9a-f]{0,63}", re.IGNORECASE)
"""What may be the beginning of one that another agent writes now."""
WRITTEN_S = 1.0
"""How long that may take."""
REMEDY = "It must be 64 hexadecimal digits: `openssl rand -hex 32` prints such"


def read_secret(file: Path | None, environ: MutableMapping[str, str] = os.environ) -> bytes | None:
    """The secret: of the file that MUSTER_SECRET_FILE names, else of MUSTER_SECRET, else of `file` in the run folder.

    Takes both variables out of the environment. None: there is no secret. Raises JobError: the first of these that is
    there cannot be read, or has another form.
    """
    named, text = drop_secret(environ)
    if named:
        return _read(SECRET_FILE, Path(named))
    if text:
        return _check(SECRET, text, "has not the form of a secret", "in the environment")
    return _read("secret", file) if file and file.exists() else None


def source_of_secret(file: Path | None, environ: Mapping[str, str] = os.environ) -> str:
    """Where `read_secret` finds it; never what it is. Empty: nowhere."""
    if environ.get(SECRET_FILE):
        return f"{environ[SECRET_FILE]}, named by {SECRET_FILE}"
    if environ.get(SECRET):
        return f"{SECRET} in the environment"
    return str(file) if file and file.exists() else ""


def shared_secret(file: Path, nodes: int) -> bytes:
    """The secret of a run that was given none: the agents share the run folder, and who comes first makes it there.

    Raises JobError: several nodes without a common run folder, which could never agree on one.
    """
    if nodes == 1:
        return secrets.token_hex(32).encode()  # for nobody else
    if not run_is_shared():
        problem = "is not set, and the nodes share no run folder, in which they could make one"
        raise JobError(SECRET, None, problem, f"Set the same one on all nodes. {REMEDY}")
    make_secret(file)
    made = read_secret(file, {})
    assert made is not None
    return made


def drop_secret(environ: MutableMapping[str, str] = os.environ) -> tuple[str, str]:
    """Take the variables that lead to a secret out of the environment, and return their values."""
    return environ.pop(SECRET_FILE, ""), environ.pop(SECRET, "")


def make_secret(file: Path) -> None:
    """Make the secret of a run, for its owner alone; one that is there stays, also one that another agent makes now.

    Raises JobError: it cannot be made, or what is there is none.
    """
    pending, text = file.with_name(f".secret-{secrets.token_hex(8)}"), secrets.token_hex(32) + "\n"
    try:
        _write_new(pending, text)
        try:
            os.link(pending, file)  # whole at once; unlike a rename, it replaces nothing
        except FileExistsError:
            raise
        except OSError:  # some file systems have no links: whoever reads half of it waits for the rest
            _write_new(file, text)
        finally:
            pending.unlink(missing_ok=True)
    except FileExistsError:
        _read("secret", file)  # of a run that goes on: said now, rather than by its agents
    except OSError as error:
        remedy = "Give a writable folder with some space, or set MUSTER_SECRET for all agents of the run"
        raise JobError("secret", str(file), f"cannot be made ({error.strerror})", remedy) from None


def _write_new(file: Path, text: str) -> None:
    """Write a file that only its owner may read. Raises FileExistsError: it is there. OSError: then it is not."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "w") as secret:
            secret.write(text)
            secret.flush()
            os.fsync(descriptor)
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _read(key: str, file: Path) -> bytes:
    begun = time.monotonic()
    try:
        while BEGUN.fullmatch(text := _text(file)) and time.monotonic() - begun < WRITTEN_S:
            time.sleep(0.01)
    except OSError as error:
        remedy = "Let the user of the agents read it, and only that one (chmod 600)"
        raise JobError(key, str(file), f"cannot be read ({error.strerror})", remedy) from None
    return _check(key, text, f"{file} does not hold a secret", str(file))


def _text(file: Path) -> str:
    with file.open("rb") as secret:
        return secret.read(100).decode(errors="replace")


def _check(key: str, text: str, problem: str, shown: str) -> bytes:
    """Never show the text itself: it may be a secret of something else."""
    if not FORM.fullmatch(text.strip()):
        raise JobError(key, shown, problem, REMEDY)
    return text.strip().lower().encode()
