"""Process that holds the engine: starts it in namespaces of its own and ends it when the tests are gone.

Run as a script by engine.py; standard library only. The engine, its containers, mounts and networks live
inside one PID, mount and network namespace. Its process 1 is killed when this process stops for any reason,
and the kernel then removes everything in it: there is no clean-up to forget and no second way to stop.
What the kernel leaves behind are folders: this process removes them, and the next one removes the rest.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

CGROUP_PREFIX = "muster-docker-"
READY_TIMEOUT_S = 60
# /run of its own: container shims put their sockets there whatever the settings say. The shell stays as
# process 1 because it reaps orphaned shims, which the engine does not.
INSIDE = """
mount -t tmpfs -o mode=755 tmpfs /run && ip link set lo up || exit 1
containerd --config "$1/containerd.toml" &
dockerd --config-file "$1/dockerd.json" &
wait $!
"""
# The plugin keeps a folder in /opt of the machine; the engine never uses it.
CONTAINERD = """
version = 2
root = "{cache}/data/containerd"
state = "{work}/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.grpc.v1.cri"]
[grpc]
address = "{work}/containerd.sock"
[debug]
level = "warn"
"""


def main(cache: Path, work: Path) -> int:
    # Either says that the tests are gone: the pipe that they close, or, where a fork of theirs kept it, their end.
    tests = select.poll()
    for handle in (sys.stdin.fileno(), os.pidfd_open(os.getppid())):
        tests.register(handle, select.POLLIN)
    try:
        with open(cache / "lock", "a+") as lock:
            if not _locked(lock, tests):
                return 1
            remove_leftovers(lock)
            lock.write(f"{os.getpid()} {work}\n")
            lock.flush()
            try:
                return _hold(cache, work, tests)
            finally:
                remove_leftovers(lock)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _locked(lock: TextIO, tests: select.poll) -> bool:
    """Waits for the cache, which one session at a time may use; False when the tests end first."""
    told = False
    while not tests.poll(0):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not told:
                print("waiting for another test session that uses this cache", flush=True)
            told = True
            time.sleep(0.1)
    return False


def _hold(cache: Path, work: Path, tests: select.poll) -> int:
    (work / "containerd.toml").write_text(CONTAINERD.format(cache=cache, work=work))
    (work / "dockerd.json").write_text(json.dumps(_settings(cache, work)))
    with open(cache / "dockerd.log", "w") as log:
        # Two death signals in a row: this process -> unshare -> process 1 of the namespace.
        namespaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        engine = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *namespaces, "sh", "-c", INSIDE, "sh", str(work)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        if not _answers(work / "docker.sock", engine):
            print("failed", flush=True)
            return 1
        print(f"ready {_process_1(engine)}", flush=True)
        tests.register(os.pidfd_open(engine.pid), select.POLLIN)
        tests.poll()
        return 0 if engine.poll() is None else 1
    finally:
        if engine.poll() is None and (process_1 := _process_1(engine)):
            os.kill(process_1, signal.SIGKILL)  # returns from wait only when the whole namespace is dead
        engine.wait()


def _settings(cache: Path, work: Path) -> dict:
    return {
        "data-root": str(cache / "data"),
        "exec-root": str(work / "exec"),
        "pidfile": str(work / "dockerd.pid"),
        "containerd": f"{work}/containerd.sock",
        "hosts": [f"unix://{work}/docker.sock"],
        "group": "root",
        "storage-driver": "overlay2",
        "log-level": "warn",
        "cgroup-parent": f"/{CGROUP_PREFIX}{os.getpid()}",
        "dns": ["127.0.0.1"],  # nothing listens: an unknown name fails at once instead of after 8 seconds
        "builder": {"gc": {"enabled": False}},  # it would delete gigabytes in the middle of a test
    }


def _answers(path: Path, engine: subprocess.Popen) -> bool:
    end = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < end and engine.poll() is None:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(2)
                client.connect(str(path))
                client.sendall(b"GET /_ping HTTP/1.0\r\nHost: engine\r\n\r\n")
                if b" 200 " in client.recv(64):
                    return True
        except OSError:
            pass
        time.sleep(0.05)
    return False


def _process_1(engine: subprocess.Popen) -> int:
    """The namespace's process 1 as seen from here, 0 when there is none. Its parent is unshare."""
    children = subprocess.run(["pgrep", "--parent", str(engine.pid)], capture_output=True, text=True).stdout.split()
    return int(children[0]) if children else 0


def remove_leftovers(lock: TextIO) -> None:
    """Removes the folders of the holder that the lock file names: this one, or one that was killed."""
    lock.seek(0)
    for holder, work in (line.split(maxsplit=1) for line in lock):
        root = Path("/sys/fs/cgroup")
        for top in [root / f"{CGROUP_PREFIX}{holder}", *root.glob(f"*/{CGROUP_PREFIX}{holder}")]:
            _remove_tree(top)
        shutil.rmtree(work.strip(), ignore_errors=True)
    lock.truncate(0)


def _remove_tree(top: Path) -> None:
    """Removes a control group, which is busy for the moment that its killed processes take to end."""
    end = time.monotonic() + 10
    for folder, _, _ in os.walk(top, topdown=False):
        while True:
            try:
                os.rmdir(folder)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(143))
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
