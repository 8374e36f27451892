"""What runs where a run folder lies that is not here: it lists files, reads them, or takes the run's code.

It is sent there as text and needs nothing but a Python: `far_side.py VERB FOLDER ...`. Both sides talk by lines of
JSON, and by bytes whose number such a line says.

list     a line for each file: its name in the folder, its size and date
read     takes lines [name, offset] up to an empty one; answers each with a line, the bytes from there on, and a line
         with the sha256 of the whole file
take     SIZE SHA256: the run's code, as FOLDER's `code.tar.gz`. Answers whether the bytes are wanted: they may be
         there, in this run folder or in one beside it. What is not whole never gets that name
"""

import hashlib
import json
import os
import shutil
import stat
import sys

BLOCK = 1 << 20
CODE = "code.tar.gz"


def say(**line: object) -> None:
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\n")
    sys.stdout.buffer.flush()


def list_files(folder: str) -> None:
    """Links are neither named nor followed: what they lead to is not the run's."""
    for here, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(here, name)
            try:
                facts = os.lstat(path)
            except OSError:  # it was removed meanwhile
                continue
            if stat.S_ISREG(facts.st_mode):
                say(name=os.path.relpath(path, folder), size=facts.st_size, mtime_ns=facts.st_mtime_ns)
    say(end=True)


def read(folder: str) -> None:
    wanted = []
    while line := sys.stdin.buffer.readline().strip():
        wanted.append(json.loads(line))
    for name, offset in wanted:
        try:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            say(name=name, error=error.strerror)
            continue
        with open(handle, "rb") as file:
            facts = os.fstat(handle)
            begin = offset if offset <= facts.st_size else 0
            say(name=name, size=facts.st_size, mtime_ns=facts.st_mtime_ns, offset=begin)
            digest, left = hashlib.sha256(), facts.st_size
            while left:
                block = file.read(min(BLOCK, left, begin or left))
                shrunk = not block  # it was cut off while it was read: what was promised is sent, with a wrong hash
                block = block or bytes(min(BLOCK, left))
                digest.update(b"shrunk" if shrunk else block)
                left -= len(block)
                if begin:
                    begin -= len(block)
                else:
                    sys.stdout.buffer.write(block)
            say(sha256=digest.hexdigest())
    say(end=True)


def take(folder: str, size: int, digest: str) -> None:
    os.makedirs(folder, mode=0o755, exist_ok=True)
    target = os.path.join(folder, CODE)
    pending = os.path.join(folder, f".{CODE}")
    beside = os.path.dirname(folder)
    others = (os.path.join(beside, name, CODE) for name in sorted(os.listdir(beside), reverse=True))
    there = next((path for path in (target, *others) if _is(path, size, digest)), None)
    if os.path.lexists(pending):  # of a try that was killed
        os.unlink(pending)
    say(wanted=there is None)
    try:
        if there is None:
            with open(pending, "xb") as file:
                while size and (block := sys.stdin.buffer.read(min(BLOCK, size))):
                    file.write(block)
                    size -= len(block)
                file.flush()
                os.fsync(file.fileno())
            if not _is(pending, os.path.getsize(pending), digest):
                say(error="it did not arrive whole")
                return
            os.chmod(pending, 0o444)
            os.replace(pending, target)
        elif there != target:
            _share(there, pending)
            os.replace(pending, target)
    finally:
        if os.path.lexists(pending):
            os.unlink(pending)
    say(end=True)


def _is(path: str, size: int, digest: str) -> bool:
    """Whether a file is there, of its owner alone, and has this content."""
    found = hashlib.sha256()
    try:
        facts = os.lstat(path)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != size:
            return False
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                found.update(block)
    except OSError:
        return False
    return found.hexdigest() == digest


def _share(there: str, pending: str) -> None:
    """The same file under a second name: the runs of a sweep need no second copy. Where there are no links, one."""
    try:
        os.link(there, pending)
    except OSError:
        with open(there, "rb") as source, open(pending, "xb") as copy:
            shutil.copyfileobj(source, copy)
        os.chmod(pending, 0o444)


def main(verb: str, folder: str, *words: str) -> None:
    os.umask(0o022)
    folder = os.path.expanduser(folder)
    sys.stdout.buffer.write(b"\n")  # behind what login scripts print without an end
    say(started=True)
    if verb == "list":
        list_files(folder)
    elif verb == "read":
        read(folder)
    else:
        take(folder, int(words[0]), words[1])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as problem:
        say(error=f"{problem.filename or ''}: {problem.strerror}")
