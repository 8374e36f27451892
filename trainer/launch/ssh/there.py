"""`muster there`: Muster on the machine that a job is sent to. It answers one request after the other until stdin ends.

Whatever else is printed here, by us or by what we start, goes to the other side as a note, or nowhere.
"""

import contextlib
import io
import json
import os
import pwd
import select
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import JobError
from trainer.launch import control
from trainer.launch.platform import JobStatus, Phase
from trainer.launch.ssh import mirror
from trainer.run.folder import RunFolder
from trainer.run.ownership import forbid_group_writes

LOGIN_S = 20.0
ALIVE_S = 10.0
CLIENTS = {"slurm": "sbatch", "docker": "docker"}
"""The command that a platform needs."""


class Notes(io.TextIOBase):
    """What is printed, sent line by line."""

    def __init__(self, say: Callable[..., None]) -> None:
        self.say, self.begun = say, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in filter(None, lines):
            self.say(note=line)
        return len(text)


class There:
    """The requests, each a method of its verb's name."""

    def __init__(self, nonce: str, folder: Path) -> None:
        self.folder = folder
        self.asked, self.answers = os.dup(0), os.dup(1)  # for ourselves: what we start gets none of them
        self.mark, self.speaks = f"\n@muster-{nonce}@", threading.Lock()
        with open(os.devnull, "r+b") as nothing:
            for number in (0, 1, 2):
                os.dup2(nothing.fileno(), number)
        sys.stdout = sys.stderr = Notes(self.say)
        self.runs: dict[str, tuple[dict[str, Any] | None, Callable[[], JobStatus]]] = {}
        self.has_login = False

    def say(self, **answer: Any) -> None:
        text = (self.mark + json.dumps(answer, default=str) + "\n").encode()
        with self.speaks:
            while text:
                text = text[os.write(self.answers, text) :]

    def main(self) -> None:
        """Answer until nobody asks."""
        threading.Thread(target=self._stay_alive, daemon=True).start()
        self.say(ready=True)
        with contextlib.suppress(BrokenPipeError, EOFError):
            while True:
                request = json.loads(self.take())
                try:
                    answer = getattr(self, "do_" + request.pop("verb"))(**request)
                except JobError as error:
                    words = [error.key, error.value, error.problem, error.remedy]
                    self.say(refused=words, kind=type(error).__name__)
                except OSError as error:
                    self.say(error="system", text=f"{error.filename or self.folder}: {error.strerror}")
                else:
                    self.say(**answer)

    def _stay_alive(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Event().wait(ALIVE_S)
                self.say(alive=True)

    def take(self) -> bytes:
        """What the other side sends next. Raises EOFError: nothing more."""
        line = b""
        while line[-1:] != b"\n":
            line += self._read(1)
        parts, left = [], int(line)
        while left:
            parts.append(self._read(min(left, 1 << 20)))
            left -= len(parts[-1])
        return b"".join(parts)

    def _read(self, most: int) -> bytes:
        found = os.read(self.asked, most)
        if not found:
            raise EOFError
        return found

    def do_has_code(self, name: str) -> dict[str, Any]:
        from trainer.launch.ssh import submission  # here: asking for a status starts faster without

        return {"found": submission.code_file(self.folder, name).exists()}

    def do_put_code(self, name: str) -> dict[str, Any]:
        from trainer.launch.ssh import submission

        submission.keep_code(self.folder, name, self.take())
        return {}

    def do_submit(self, platform: str, **what: Any) -> dict[str, Any]:
        """Hand a job over to its platform, once."""
        from trainer.launch.ssh import submission

        self._log_in()
        self.runs.clear()
        return {"handle": submission.submit(self.folder, platform, **what)}

    def do_look(self, run: str, have: dict[str, int], logs: bool, begun: str | None) -> dict[str, Any]:
        """Where a run stands, and what is new in its folder; `begun`: the submission that it must be of, if any."""
        folder = mirror.run_of(run)
        if mirror.is_under_way(folder):
            return {"status": vars(JobStatus(Phase.PENDING, "it is being submitted")), "files": {}, "gone": []}
        if run not in self.runs:
            self.runs[run] = control.status_of(folder)
        handle, ask = self.runs[run]
        if handle is None or begun not in (None, handle.get("submission")):
            del self.runs[run]
            return {"status": vars(JobStatus(Phase.LOST, mirror.NEVER)), "files": {}, "gone": []}
        self._need(handle["platform"])
        status = ask()  # first: what it was told to be before its files were read, they may explain
        ended = {"ended": handle} if begun and not status.is_active else {}
        return {"status": vars(status), **ended, **mirror.collect(folder, have, logs)}

    def do_cancel(self, run: str) -> dict[str, Any]:
        return self._act(control.cancel, run)

    def do_preempt(self, run: str) -> dict[str, Any]:
        return self._act(control.preempt, run)

    def _act(self, verb: Callable[[str], None], run: str) -> dict[str, Any]:
        folder = str(RunFolder.open(mirror.run_of(run).path))
        found = control.status_of(RunFolder(Path(folder)))[0]
        self._need(str((found or {}).get("platform")))
        self.runs.pop(run, None)
        verb(folder)
        return {}

    def _need(self, platform: str) -> None:
        """Look where a log-in would look, if the platform's command is not where other shells look."""
        if shutil.which(CLIENTS.get(platform, "sh")) is None:
            self._log_in()

    def _log_in(self) -> None:
        """Take over what the user's log-in shell sets: jobs get the same as when they are submitted by hand."""
        if self.has_login:
            return
        self.has_login = True
        shell = pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
        code = f"import json,os;print({self.mark!r}+json.dumps(dict(os.environ)))"
        words = [shell, "-l", "-c", f"exec {shlex.quote(sys.executable)} -I -c {shlex.quote(code)}"]
        try:
            found = json.loads(_said_after(self.mark, words))
        except (OSError, ValueError):  # a shell without these options, or one that waits for something
            self.say(note=f"{shell} -l does not show its environment: jobs get that of a plain ssh command")
            return
        os.environ.update({name: value for name, value in found.items() if name not in ("_", "PWD", "SHLVL")})


def _said_after(mark: str, words: Sequence[str]) -> str:
    """The line after the mark that a command prints. What it leaves running may keep its output open."""
    end, said = time.monotonic() + LOGIN_S, b""
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while b"\n" not in (line := said.partition(mark.encode())[2]):
            waits = not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]
            if waits or not (new := os.read(process.stdout.fileno(), 1 << 16)):
                break
            said += new
        process.kill()
    return line.decode(errors="replace")


def main() -> None:
    forbid_group_writes()
    There(sys.argv[1], Path(sys.argv[2])).main()


if __name__ == "__main__":
    main()
