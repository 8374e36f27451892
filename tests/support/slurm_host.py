"""Process 1 of a host of the test cluster, in namespaces of its own: name, address, /proc, /tmp, /dev/shm.

python slurm_host.py NAME ADDRESS SHARED    SHARED is a JSON list of folders that all hosts see
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # runs in isolated mode
from slurm_config import STATE
from slurm_programs import call, pid_outside, wait_for


def run(name: str, address: str, shared: list[str]) -> None:
    """Sets the host up, says so in two lines on stdout, and stays as the parent of orphans until killed."""
    print(pid_outside(), flush=True)
    os.chdir("/")
    socket.sethostname(name)
    call("mount", "-t", "proc", "proc", "/proc")
    call("mount", "-t", "tmpfs", "-o", "mode=1777", "shm", "/dev/shm")
    mount_private_tmp(STATE / f"tmp.{name}", shared)
    call("ip", "link", "set", "lo", "up")
    wait_for("network cable", lambda: "eth0:" in Path("/proc/net/dev").read_text())
    call("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    call("ip", "link", "set", "eth0", "up")
    print("connected", flush=True)
    # The kernel then collects what ends here. Daemons start from outside, so that they do not inherit this.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        signal.pause()


def mount_private_tmp(place: Path, shared: list[str]) -> None:
    """Gives the host an empty /tmp of its own, in which what all hosts share still is where it was."""
    place.mkdir(exist_ok=True)
    call("mount", "-t", "tmpfs", "-o", "mode=1777", "tmp", place)
    for path in shared:
        if path.startswith("/tmp/"):
            (place / path[5:]).mkdir(parents=True, exist_ok=True)
            call("mount", "--rbind", path, place / path[5:])
    call("mount", "--move", place, "/tmp")


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
