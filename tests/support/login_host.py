"""A machine that is reached by ssh alone, such as a login host of the test cluster: a real sshd. And who logs in there.

There is no port: ssh's own ProxyCommand starts one sshd for each connection, so killing either end is what a cut is.
The user's home there is a folder of its own, and the project's folder here is hidden.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from muster_runs import MUSTER, hear_interrupts, kill
from paths import ROOT

SSHD = "/usr/sbin/sshd"
ENTER = """#!/bin/sh
# The login host, as one connection sees it.
exec {enter} unshare --mount sh -c '
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
    """`folder` is seen by all hosts. `enter`: what enters its namespaces. It does not see the folders `hidden`."""

    def __init__(self, folder: Path, enter: str = "", *hidden: Path) -> None:
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
        words = {"enter": enter, "hidden": " ".join(map(str, hidden)), "sshd": SSHD}
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


class Laptop:
    """A user's project on this machine, and the site file that leads to the other one."""

    def __init__(self, host: LoginHost, folder: Path, platform: str = "slurm") -> None:
        self.host, self.project, self.platform = host, project(folder / "project"), platform
        self.site = host.site()
        self.runs_there = host.home / ".muster" / "runs"

    def start(self, *words: object, **options: Any) -> subprocess.Popen[str]:
        command = [str(word) for word in (MUSTER, *words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(
            command, cwd=self.project, env=self.host.environment(), preexec_fn=hear_interrupts, **pipes
        )

    def muster(self, *words: object) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=400)
        finally:
            kill(process.pid)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def must(self, *words: object) -> str:
        done = self.muster(*words)
        assert done.returncode == 0, f"{words}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: object, site: Path | None = None) -> Path:
        command = ("submit", "job.yaml", "--on", self.platform, "--site", site or self.site)
        return Path(self.must(*command, *words).splitlines()[-1])

    def status(self, run: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.must("status", run, "--json"))
        return found

    def there(self, run: Path) -> Path:
        return Path(json.loads((run / "handle.json").read_text())["there"]["run"])


def project(folder: Path) -> Path:
    """A small project of a user's own, which is no part of this repository."""
    folder.mkdir(parents=True)
    for name in ("slow.yaml", "slow_digits.py"):
        (folder / name).write_bytes((ROOT / "tests/support" / name).read_bytes())
    (folder / "slow.yaml").rename(folder / "job.yaml")
    return folder
