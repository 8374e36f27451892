"""In each pod, before its agent starts: compare the run's code with its hash, and unpack it. Standard library alone.

`unpack.py SHA256 FOLDER PART...`: the parts are one gzip together; the hash is that of what is inside, a tar. What ends
here with 64 ends the Job: another pod would find the same.
"""

import gzip
import hashlib
import io
import os
import shutil
import sys
import tarfile
import time
import zlib

WRONG = 64
LATE_S = 90.0
"""NFS asks its server again after acregmax and acdirmax, 60 s by default (nfs(5))."""


def main(expected: str, folder: str, *parts: str) -> None:
    packed = b"".join(map(_read, parts))
    try:
        data = gzip.decompress(packed)
        found = hashlib.sha256(data).hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        data, found = b"", f"that of no archive ({error})"
    if found != expected:
        _refuse(f"is not what was submitted: its sha256 is {found}, not {expected}. Somebody changed it: submit again")
    for name in os.listdir(folder):  # of a try that was cut off, as by a reboot of the node
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:  # which is ours, as its hash says: links may leave it
        archive.extraction_filter = lambda member, path: member
        archive.extractall(folder)
    print(f"[muster] code {found} is in {folder}", flush=True)


def _read(part: str) -> bytes:
    end = time.monotonic() + LATE_S
    while not os.path.exists(part) and time.monotonic() < end:
        time.sleep(0.5)
    try:
        with open(part, "rb") as file:
            return file.read()
    except FileNotFoundError:
        _refuse(f"is not there: {part}. Somebody removed it, or the claim is another one: submit again")
        raise


def _refuse(problem: str) -> None:
    print(f"ERROR: the run's code {problem}", file=sys.stderr)
    sys.exit(WRONG)


if __name__ == "__main__":
    os.umask(0o022)
    main(*sys.argv[1:])
