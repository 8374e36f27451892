"""What another machine runs first: it is sent there as text, so it needs nothing but a Python, and says if that is old.

It takes Muster, has an environment of Python made where the site names none, and hands over to `there`. All that it
imports comes with Python 3.6.
"""

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import threading

OLDEST = (3, 10)
SUCCESSORS = [f"python3.{minor}" for minor in range(14, 9, -1)]
ASKED = json.loads(base64.b64decode(sys.argv[1]).decode())
"""nonce, folder, the hash of Muster, the name of the environment, and whether the site names this Python."""


SPEAKS = threading.Lock()


def say(**answer: object) -> None:
    """One line that the other side tells from what login scripts print."""
    with SPEAKS:
        sys.stdout.write("\n@muster-" + ASKED["nonce"] + "@" + json.dumps(answer) + "\n")
        sys.stdout.flush()


def take(what: str) -> bytes:
    """Ask for something, and return its bytes."""
    say(need=what)
    line = content = b""
    while line[-1:] != b"\n":
        line += read(1)
    while len(content) < int(line):
        content += read(min(int(line) - len(content), 1 << 20))
    return content


def read(most: int) -> bytes:
    """What comes next. Exits: nothing more."""
    found = os.read(0, most)
    if not found:
        raise SystemExit(1)
    return found


def newer_python() -> None:
    """Go on with a newer Python, if there is one under its own name."""
    found = next(filter(None, map(shutil.which, SUCCESSORS)), None)
    if found is None or ASKED["given"]:
        version = ".".join(map(str, sys.version_info[:2]))
        say(error="python", text=f"{sys.executable} is Python {version}")
        raise SystemExit(1)
    with open("/proc/self/cmdline", "rb") as file:
        os.execv(found, [found] + [os.fsdecode(word) for word in file.read().split(b"\0")[1:-1]])


def own_folder() -> str:
    """The folder of everything here. What others could write into would be run as this user."""
    folder = os.path.realpath(os.path.expandvars(os.path.expanduser(str(ASKED["folder"]))))
    if not os.path.isdir(folder):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    facts = os.stat(folder)
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        say(error="folder", text=folder + " can be written to by other users")
        raise SystemExit(1)
    return folder


def take_muster(place: str) -> None:
    """Unpack Muster, as a whole or not at all."""
    content = gzip.decompress(take("muster"))
    if hashlib.sha256(content).hexdigest()[:16] != ASKED["muster"]:
        say(error="muster", text="what arrived has another hash")
        raise SystemExit(1)
    pending = f"{place}.{os.getpid()}"
    shutil.rmtree(pending, ignore_errors=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
            tar.extractall(pending)
        os.rename(pending, place)
    except OSError:
        shutil.rmtree(pending, ignore_errors=True)
        if not os.path.isdir(place):  # otherwise another process was faster
            raise


def main() -> None:
    if sys.version_info < OLDEST:
        newer_python()
    os.umask(os.umask(0o022) | 0o022)
    folder = own_folder()
    muster = os.path.join(folder, "muster-" + ASKED["muster"])
    if not os.path.isdir(muster):
        take_muster(muster)
    python = sys.executable
    if not ASKED["given"]:
        place = os.path.join(folder, ASKED["environment"])
        if not os.path.exists(os.path.join(place, "complete")):
            sys.path.insert(0, muster)
            from trainer.launch.ssh.environment import make_environment

            make_environment(place, json.loads(take("environment").decode()), say)
        python = os.path.join(place, "bin", "python")
    os.execv(python, [python, os.path.join(muster, "muster.py"), "there", ASKED["nonce"], folder])


def alive() -> None:
    while True:
        threading.Event().wait(10)
        say(alive=True)


threading.Thread(target=alive, daemon=True).start()
try:
    main()
except OSError as error:
    say(error="system", text="{}: {}".format(error.filename or ASKED["folder"], error.strerror))
    raise SystemExit(1) from None
