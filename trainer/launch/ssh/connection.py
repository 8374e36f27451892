"""One connection to another machine: the user's own `ssh`, with its configuration, jump hosts and agents.

A second process of `ssh` keeps it open for some minutes, so that the next command needs not log in again. Nothing asks
for anything: what would be a prompt is an error that says what to do once by hand.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainer.errors import FAILED, JobError

HOST = r"[A-Za-z0-9_]([\w.-]*@)?[\w.:%-]*"
"""What a host may be called: what a file says must not become an option of ssh."""
ABSOLUTE = r"[~/$][^\0\n]*"
"""A path over there."""
CONNECT_S = 15
"""How long a machine may take to answer; as long again for the log-in."""
KEPT_S = 600
"""For how long a connection that nobody uses stays open."""
OPTIONS = {
    "BatchMode": "yes", "ConnectTimeout": str(CONNECT_S), "ServerAliveInterval": "10", "ServerAliveCountMax": "3",
    "RemoteCommand": "none", "RequestTTY": "no", "ClearAllForwardings": "yes", "LogLevel": "ERROR",
}  # fmt: skip
"""Beside the user's own. Without the last three, a host that is set up for people may print, or open ports."""


class NotReached(JobError):
    """The other machine cannot be asked now: neither the job nor the site is wrong."""

    code = FAILED


@dataclass(frozen=True)
class Connection:
    """How `ssh` reaches a machine."""

    host: str
    config: str | None = None
    """ssh -F."""

    def argv(self, *words: str, options: dict[str, str] | None = None) -> list[str]:
        """A command line of ssh. `words`: options before the host, then what follows it after `--`."""
        given = [f"-o{name}={value}" for name, value in (OPTIONS | (options or {})).items()]
        return [*self._ssh, *given, *words]

    @property
    def _ssh(self) -> list[str]:
        return ["ssh", *(["-F", self.config] if self.config else [])]

    @property
    def by_hand(self) -> str:
        """The command with which the user logs in."""
        return shlex.join([*self._ssh, self.host])

    @cached_property
    def shared(self) -> dict[str, str]:
        """Options for the socket of a shared connection: the user's own, if the configuration has one; else ours."""
        done = _run([*self._ssh, "-T", "-G", "--", self.host], CONNECT_S)
        if done.returncode:
            raise self._refusal(done.stderr)
        if re.search(r"^controlpath (?!none$)", done.stdout, re.MULTILINE):
            return {}
        folder = _private_folder()
        config = hashlib.sha256(os.path.abspath(self.config or "").encode()).hexdigest()[:8]
        return {"ControlPath": str(folder / f"{config}-%C") if folder else "none"}

    def open(self) -> None:
        """Connect, unless a connection is there. Raises NotReached, or JobError: ssh or the machine refuses."""
        if shutil.which("ssh") is None:
            raise JobError("ssh", self.host, "this machine has no ssh command", "Install OpenSSH's client")
        if self.shared.get("ControlPath") == "none":
            return
        asking = self.argv("-O", "check", "--", self.host, options=self.shared)
        # auto, not yes: that one would not take the place of a socket whose process was killed
        options = self.shared | {"ControlMaster": "auto", "ControlPersist": str(KEPT_S)}
        with self._alone():
            if _run(asking, CONNECT_S).returncode == 0:
                return
            done = _run(self.argv("-f", "-N", "--", self.host, options=options), 3 * CONNECT_S)
        if done.returncode:
            raise self._refusal(done.stderr, self.shared)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let other commands wait: of several connections that are made at once only one is shared, and ever closed."""
        folder = _private_folder()
        if folder is None:
            yield
            return
        name = hashlib.sha256(f"{self.config} {self.host}".encode()).hexdigest()[:16]
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def command(self, text: str) -> list[str]:
        """The command line that runs `text` in a shell over there."""
        return self.argv("-T", "--", self.host, text, options=self.shared | {"ControlMaster": "no"})

    def forget(self) -> None:
        """Close a connection that does not answer any more, so that the next try makes a new one."""
        if self.shared.get("ControlPath"):
            _run(self.argv("-O", "exit", "--", self.host, options=self.shared), CONNECT_S)

    def _refusal(self, said: str, options: dict[str, str] | None = None) -> JobError:
        """What ssh says, in one line, with the remedy. `options`: for a shared connection."""
        lines = [line.strip() for line in said.splitlines() if line.strip() and "ControlSocket" not in line]
        text = lines[-1].rstrip(".") if lines else "ssh gave no reason"
        for pattern, kind, problem, remedy in REFUSALS:
            if re.search(pattern, said, re.IGNORECASE):
                shared = [f"-o{name}={value}" for name, value in (options or {}).items()]
                login = shlex.join([*self._ssh, "-MNf", "-oControlPersist=8h", *shared, self.host])
                words = {"by_hand": self.by_hand, "text": text, "login": login, "host": self.host}
                return kind("ssh", self.host, problem.format(**words), remedy.format(**words))
        return NotReached("ssh", self.host, f"cannot be reached: {text}", f"Try `{self.by_hand}` by hand")


REFUSALS: tuple[tuple[str, type[JobError], str, str], ...] = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", JobError, "has another host key than before",
     "Ask its administrators whether it was installed again. If so: ssh-keygen -R {host}, then `{by_hand}` by hand"),
    ("Host key verification failed", JobError, "its host key is not known on this machine",
     "Log in once by hand, and compare the key that it shows: {by_hand}"),
    ("Permission denied|Too many authentication failures", JobError, "does not let you in: {text}",
     "Set User and IdentityFile for it in ~/.ssh/config, or ssh-add your key. If it wants a password or a code, log in "
     "once by hand, and Muster uses that connection: {login}"),
    ("Could not resolve hostname", NotReached, "is not a host that this machine knows: {text}",
     "Correct `ssh` in the site file, or name the host in ~/.ssh/config"),
    ("Bad configuration option|Can't open user config|terminating, .* bad config|Bad owner or permissions", JobError,
     "ssh refuses its configuration: {text}", "Correct it: `{by_hand}` shows the same message"),
)  # fmt: skip
"""A pattern of what ssh says, the kind of the error, the problem and the remedy."""


def _run(argv: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run ssh without a terminal, so that Ctrl-C does not end it and nothing can be asked there.

    What it says goes to a file: the process that stays behind keeps the end of a pipe open.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as said:
        try:
            code = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=said, start_new_session=True, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            code = 255
            said.write(f"no answer within {limit_s:.0f} s\n")
        out.seek(0)
        said.seek(0)
        return subprocess.CompletedProcess(argv, code, out.read(), said.read())


def _private_folder() -> Path | None:
    """A folder for sockets that nobody else gets into, with a path that is short enough for them; None: there is none.

    A user's runtime folder is emptied at the end of the session, and the connection with it.
    """
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        folder = Path(parent or "/", f"muster-{os.geteuid()}")
        if not parent or len(str(folder)) > 40:
            continue
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            facts = folder.lstat()
            if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077:
                return folder
    return None
