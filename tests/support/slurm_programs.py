"""Starting programs inside the test cluster, and waiting for what they bring up. Standard library only."""

import os
import socket
import subprocess
import time
from collections.abc import Callable

from slurm_config import CONTROLLER


def call(*command: object) -> str:
    """Runs a program and returns its output. RuntimeError with its own words when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def wait_for(what: str, ready: Callable[[], bool], timeout_s: float = 90, every_s: float = 0.02) -> None:
    """Polls until ready() is true. RuntimeError that names what it waited for."""
    end = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not after {timeout_s:.0f} s")
        time.sleep(every_s)


def listens(port: int) -> bool:
    """Whether a daemon of the controller accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex((CONTROLLER, port)) == 0


def pid_outside() -> int:
    """This process's id as the rest of the machine knows it, while /proc is still the machine's."""
    return int(os.readlink("/proc/self"))
