"""A login host of the test cluster: a real sshd in the controller's namespaces, which nothing but ssh reaches.

There is no port: ssh's own ProxyCommand starts one sshd for each connection, so killing either end is what a cut is.
The user's home there is a folder of its own, and the project's folder here is hidden.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from muster_runs import kill
from paths import ROOT
from slurm_cluster import Cluster
from slurm_config import CONTROLLER

SSHD = "/usr/sbin/sshd"
ENTER = """#!/bin/sh
# The login host, as one connection sees it.
exec nsenter --target {pid} --mount --net --uts --ipc unshare --mount sh -c '
  mount --bind {folder}/passwd /etc/passwd
  for hidden in {hidden}; do mkdir -p $hidden && mount -t tmpfs hidden $hidden; done
  mkdir -p /run/sshd && cd / && exec {sshd} -i -f {folder}/sshd_config'
"""
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
LogLevel QUIET
"""
SSH_CONFIG = """\
Host login stranger intruder nobody
  ProxyCommand {folder}/enter
Host stranger
  UserKnownHostsFile /dev/null
Host intruder
  IdentityFile {folder}/other_key
Host nobody
  User nobody-here
Host nowhere
  ProxyCommand sh -c "echo no route to host >&2; exit 1"
Host login stranger nobody
  IdentityFile {folder}/user_key
Host *
  User root
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
"""


class LoginHost:
    """`folder` is seen by all hosts; `hidden` are folders that the login host does not see."""

    def __init__(self, cluster: Cluster, folder: Path, *hidden: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.sockets = tempfile.mkdtemp(prefix="m-", dir="/tmp")  # their paths have to be short
        self.home.mkdir(parents=True)
        for name in ("host_key", "user_key", "other_key"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
        self.keep("passwd", f"root:x:0:0:root:{self.home}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n")
        self.keep("sshd_config", SSHD_CONFIG)
        self.keep("ssh_config", SSH_CONFIG)
        self.keep("known_hosts", f"login,intruder,nobody {(folder / 'host_key.pub').read_text()}")
        words = {"pid": cluster.pids[CONTROLLER], "hidden": " ".join(map(str, hidden)), "sshd": SSHD}
        self.keep("enter", ENTER, **words).chmod(0o755)

    def keep(self, name: str, text: str, **words: object) -> Path:
        path = self.folder / name
        path.write_text(text.format(folder=self.folder, **words) if "{folder}" in text else text)
        return path

    def site(self, host: str = "login", **keys: object) -> Path:
        """A site file that leads there; by default with the Python of these tests."""
        given = {"ssh": host, "ssh_config": self.folder / "ssh_config", "python": sys.executable, **keys}
        text = "".join(f"{key}: {value}\n" for key, value in given.items())
        return self.keep(f"{host}-{abs(hash(text))}.yaml", text)

    def environment(self) -> dict[str, str]:
        """Of the user here, who has neither Slurm nor this repository on any path."""
        ours = ("MUSTER_", "SLURM_", "PYTHON")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return kept | {"OMP_NUM_THREADS": "1", "XDG_RUNTIME_DIR": self.sockets}

    def stop(self) -> None:
        for pid in self.processes("ssh", "there"):
            kill(pid)
        shutil.rmtree(self.sockets)

    def processes(self, *words: str) -> list[int]:
        """Processes of ssh and its other end, of this host alone, whose command line has one of the words."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (path / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            ours = str(self.folder), self.sockets  # of the process that shares a connection, only a title is left
            if any(word in line for word in words) and any(each in line + environment for each in ours):
                found.append(int(path.name))
        return sorted(found)


def project(folder: Path) -> Path:
    """A small project of a user's own, which is no part of this repository."""
    folder.mkdir(parents=True)
    for name in ("slow.yaml", "slow_digits.py"):
        (folder / name).write_bytes((ROOT / "tests/support" / name).read_bytes())
    (folder / "slow.yaml").rename(folder / "job.yaml")
    return folder
