"""A conversation with Muster on another machine: one process over there, which answers one request after the other."""

import base64
import contextlib
import json
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import JobError, MaybeAccepted, Refused
from trainer.launch.ssh.connection import Connection, NotReached
from trainer.launch.ssh.parcel import pack_muster

BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
SILENCE_S = 60.0
"""For how long the other side may say nothing: it says every ten seconds that it is at work."""
RUN_TEXT = "import sys,zlib,base64;exec(zlib.decompress(base64.b64decode(sys.argv.pop(1))))"
PLAIN = re.compile(r"([^A-Za-z0-9_/.~$+{}@%:,=-])")
"""What a shell might not take as it is; `~` and `$NAME` are for the shell over there."""


@dataclass(frozen=True)
class Place:
    """Where Muster is on another machine."""

    connection: Connection
    folder: str
    python: str | None
    """An interpreter that has what Muster needs; None: one is made, with the name `environment`."""
    environment: str = ""


class Session:
    """What is asked and answered. `wanted`: the files that an environment is made from, if it is not there yet."""

    def __init__(self, place: Place, wanted: Callable[[], dict[str, str]] | None = None) -> None:
        place.connection.open()
        self.place, self.host = place, place.connection.host
        nonce = secrets.token_hex(8)
        self.mark = f"@muster-{nonce}@".encode()
        asked = {
            "nonce": nonce, "folder": place.folder, "muster": pack_muster().name,
            "environment": place.environment, "given": place.python is not None,
        }  # fmt: skip
        code = base64.b64encode(zlib.compress(BOOTSTRAP.read_bytes(), 9)).decode()
        words = base64.b64encode(json.dumps(asked).encode()).decode()
        self.python = PLAIN.sub(r"\\\1", place.python or "python3")
        self.said, self.buffer, self.chatter = tempfile.TemporaryFile(), b"", b""  # noqa: SIM115
        self.process = subprocess.Popen(
            place.connection.command(f"exec {self.python} -I -c '{RUN_TEXT}' {code} {words}"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, start_new_session=True,
        )  # fmt: skip
        try:
            self._begin(wanted)
        except BaseException:
            self.close()
            raise

    def _begin(self, wanted: Callable[[], dict[str, str]] | None) -> None:
        while "ready" not in (answer := self._answer()):
            if answer["need"] == "muster":
                self._send(pack_muster().packed)
            elif wanted is not None:
                self._send(json.dumps(wanted()).encode())
            else:
                problem = f"its environment {self.place.folder}/{self.place.environment} is gone"
                raise JobError("ssh", self.host, problem, "`muster run` with the job file makes it again")

    def request(self, verb: str, content: bytes = b"", **fields: Any) -> dict[str, Any]:
        """Ask for something. Raises JobError: as over there; NotReached: no answer came."""
        try:
            self._send(json.dumps({"verb": verb, **fields}).encode())
            if content:
                self._send(content)
            return self._answer()
        except BaseException as error:
            if not isinstance(error, JobError) or isinstance(error, NotReached):
                self.close()  # an answer that is still to come would be taken for that to the next request
            raise

    def _send(self, content: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"%d\n" % len(content) + content)
            self.process.stdin.flush()
        except OSError:
            raise self._end() from None

    def _answer(self) -> dict[str, Any]:
        """The next answer; what is only said on the way is shown here. Raises what the answer is, if it is an error."""
        while True:
            answer = self._line()
            if "note" in answer:
                print(f"{self.host}: {answer['note']}", file=sys.stderr, flush=True)
            elif "refused" in answer:
                raise KINDS.get(answer["kind"], JobError)(*answer["refused"])
            elif "error" in answer:
                raise JobError("ssh", self.host, answer["text"], REMEDIES[answer["error"]])
            elif "alive" not in answer:
                return answer

    def _line(self) -> dict[str, Any]:
        """The next line that is ours. Login scripts may print others."""
        assert self.process.stdout is not None
        end = time.monotonic() + SILENCE_S
        while True:
            line, found, rest = self.buffer.partition(b"\n")
            if found:
                self.buffer = rest
                before, mark, text = line.partition(self.mark)
                if mark:
                    with contextlib.suppress(ValueError):
                        answer = json.loads(text)
                        assert isinstance(answer, dict)
                        return answer
                self.chatter = before.strip() or self.chatter
                continue
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise NotReached("ssh", self.host, f"said nothing for {SILENCE_S:.0f} s", "Try again")
            new = os.read(self.process.stdout.fileno(), 1 << 16)
            if not new:
                raise self._end()
            self.buffer += new
            end = time.monotonic() + SILENCE_S

    def _end(self) -> JobError:
        """Why the other side is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.said.seek(0)
        lines = [line.strip() for line in self.said.read().decode(errors="replace").splitlines() if line.strip()]
        text = lines[-1] if lines else ""
        if self.process.returncode in (126, 127):
            return JobError("ssh", self.host, f"has no {self.python} that runs: {text}", REMEDIES["python"])
        if self.process.returncode in (255, None) or self.process.returncode < 0:
            self.place.connection.forget()
            return NotReached("ssh", self.host, f"the connection was cut{': ' * bool(text)}{text}", "Try again")
        return NotReached(
            "ssh", self.host, f"ended without an answer (exit {self.process.returncode}): {text or self.chatter!r}",
            f"The machine must run commands: try `{self.place.connection.by_hand} true` by hand",
        )  # fmt: skip

    def close(self) -> None:
        """End it; the connection stays open for the next one."""
        for file in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        try:
            self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()

    @property
    def is_open(self) -> bool:
        return self.process.poll() is None and not self.said.closed


KINDS: dict[str, type[JobError]] = {kind.__name__: kind for kind in (MaybeAccepted, Refused)}
"""Of what may be refused over there, what matters here."""
REMEDIES = {
    "python": "Muster needs Python 3.10 or newer there: name such an interpreter with `python` in the site file",
    "folder": "Set `ssh_folder` to a folder of yours, or: chmod go-w",
    "muster": "Try again",
    "system": "Correct that over there, or set another `ssh_folder` in the site file",
    "environment": "Correct that over there, such as pip's index (~/.config/pip/pip.conf), or set `python` in the site "
    "file to an interpreter that has the packages",
}
"""By what an error of the other side is about, before Muster itself runs there."""
