"""Process 1 of the test cluster's controller: slurmctld, the database, the switch, the hosts' power buttons.

Runs in namespaces of its own. When it ends, the kernel ends every process, mount and interface of the
cluster with it, and that is the whole of the clean-up.

python slurm_controller.py LAYOUT SHARED OWNER FOLDER
  LAYOUT, SHARED  JSON: fields of slurm_config.Layout; folders that all hosts see
  OWNER           file descriptor, a pidfd: when its process ends, so does the cluster
  FOLDER          removed at the end

Answers on stdout, one JSON object a line: first when the cluster is up, then to each request on stdin.
"""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # runs in isolated mode
import slurm_config
import slurm_database
from slurm_config import CONTROLLER, STATE, Layout
from slurm_programs import call, listens, pid_outside, wait_for

HOST = Path(__file__).with_name("slurm_host.py")
# Named one by one: nsenter's --all looks itself up in the machine's /proc, by an id that is valid only here.
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")


class Controller:
    """The daemons and the hosts. Process ids are those that the rest of the machine sees."""

    def __init__(self, layout: Layout, shared: list[str]):
        self.layout = layout
        self.shared = shared
        self.children: dict[int, subprocess.Popen] = {}
        self.hosts: dict[str, tuple[subprocess.Popen, int]] = {}  # name -> its unshare and its process 1

    def start(self) -> None:
        socket.sethostname(CONTROLLER)
        self.write_configuration()
        call("ip", "link", "set", "lo", "up")
        call("ip", "link", "add", "switch", "type", "bridge", "forward_delay", "0")
        call("ip", "addr", "add", f"{self.layout.address(CONTROLLER)}/24", "dev", "switch")
        call("ip", "link", "set", "switch", "up")
        self.start_munge()
        for name in self.layout.host_names:
            self.launch_host(name)
        if self.layout.accounting:
            slurm_database.start(self.spawn)
        self.spawn("slurmctld", "slurmctld", "-D", "-i")
        # A slurmd that comes too early asks again only seconds later.
        wait_for("slurmctld", lambda: listens(6817))
        for name in self.layout.host_names:
            self.connect_host(name)
        wait_for("hosts in service", self.all_idle, every_s=0.1)

    def write_configuration(self) -> None:
        call("mount", "-t", "tmpfs", "-o", "mode=755", "cluster", "/run")
        for folder in ("state", "spool", "run", "log", "dev", "munge"):
            (STATE / folder).mkdir(parents=True)
        for number in range(self.layout.gpus_per_host):
            os.mknod(STATE / f"dev/gpu{number}", 0o20666, os.makedev(195, number))
        for name, text in slurm_config.files(self.layout).items():
            path = STATE / "etc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600 if name.endswith("slurmdbd.conf") else 0o644)
            path.write_text(text)
        for entry in (STATE / "etc").iterdir():
            call("mount", "--bind", entry, os.path.realpath(f"/etc/{entry.name}"))

    def all_idle(self) -> bool:
        command = ["sinfo", "-h", "-p", "normal", "-t", "idle", "-o", "%D"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and any(child.poll() is not None for child in self.children.values()):
            raise RuntimeError("a daemon ended while the cluster came up")
        return sum(map(int, done.stdout.split())) == self.layout.hosts

    def spawn(self, log: str, *command: object) -> None:
        """Starts a daemon that writes to its own log file."""
        words = [str(word) for word in command]
        with open(STATE / f"log/{log}.out", "a") as out:
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self.children[child.pid] = child

    def start_munge(self) -> None:
        # One munged serves all hosts through its socket: they are one trust domain and one kernel.
        key = STATE / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        os.mkdir("/run/munge", 0o755)
        files = [f"--{name}-file={STATE}/munge/{name}" for name in ("key", "log", "seed", "pid")]
        self.spawn("munged", "munged", "--foreground", *files)
        wait_for("munged", lambda: os.path.exists("/run/munge/munge.socket.2"))

    def launch_host(self, name: str) -> None:
        """Powers a host on, without its network."""
        arguments = [name, self.layout.address(name), json.dumps(self.shared)]
        child = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child=KILL", sys.executable, "-I", HOST, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
        )
        self.children[child.pid] = child
        self.hosts[name] = (child, int(child.stdout.readline()))

    def connect_host(self, name: str) -> int:
        """Plugs the network cable in and starts slurmd. Returns the host's process 1."""
        child, pid = self.hosts[name]
        # Made on the host's side: "netns 1" names us there too, whatever the rest of the machine calls us.
        cable = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", "1"]
        call("nsenter", "--target", pid, "--net", *cable)
        call("ip", "link", "set", name, "master", "switch", "up")
        if child.stdout.readline() != "connected\n":
            raise RuntimeError(f"host {name} did not come up")
        self.start_slurmd(name)
        return pid

    def start_slurmd(self, name: str) -> None:
        pid = self.hosts[name][1]
        self.spawn(f"slurmd.{name}", "nsenter", "--target", pid, *NAMESPACES, "slurmd", "-D")

    def boot(self, name: str) -> int:
        self.launch_host(name)
        return self.connect_host(name)

    def power_off(self, name: str) -> None:
        """Ends every process of a host at once. Its peers get no farewell packet: the cable goes first."""
        child, pid = self.hosts.pop(name)
        call("ip", "link", "delete", name)
        child.kill()  # unshare takes the host's process 1 with it, and the kernel all the others

        def gone() -> bool:
            self.reap()
            return not os.path.exists(f"/proc/{pid}")

        wait_for(f"power-off of {name}", gone)

    def reap(self) -> None:
        """Collects what ended: our children, and the orphans that process 1 inherits."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            child = self.children.pop(ended.si_pid, None)
            if child:
                child.wait()
            else:
                os.waitpid(ended.si_pid, 0)

    def serve(self, owner: int) -> None:
        """Obeys requests, one JSON list a line, until the owner hangs up or ends, in whatever way."""
        requests = {"boot": self.boot, "power_off": self.power_off, "start_slurmd": self.start_slurmd}
        poll = select.poll()
        poll.register(sys.stdin, select.POLLIN)
        poll.register(owner, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(500)]
            self.reap()
            if owner in ready:
                return
            if ready:
                line = sys.stdin.readline()
                if not line:
                    return
                request, *arguments = json.loads(line)
                try:
                    answer = {"result": requests[request](*arguments)}
                except Exception as error:
                    answer = {"error": f"{request}: {error}"}
                print(json.dumps(answer), flush=True)


def last_words() -> str:
    """The end of every daemon's log, for a cluster that did not come up."""
    logs = sorted(STATE.glob("log/*"))
    ends = ["".join(log.read_text(errors="replace").splitlines(True)[-8:]) for log in logs]
    return "\n".join(f"== {log.name}\n{end}" for log, end in zip(logs, ends, strict=True))


def end_all(folder: str) -> None:
    os.kill(-1, signal.SIGKILL)  # everything in this namespace but us
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    shutil.rmtree(folder, ignore_errors=True)  # nobody is left to write into it


if __name__ == "__main__":
    layout, shared, owner, folder = sys.argv[1:]
    os.chdir("/")
    controller = Controller(Layout(**json.loads(layout)), json.loads(shared))
    try:
        controller.start()
        pids = {name: pid for name, (_, pid) in controller.hosts.items()}
        first = {"result": {**pids, CONTROLLER: pid_outside()}}
    except Exception as error:
        first = {"error": f"{error}\n{last_words()}"}
    print(json.dumps(first), flush=True)
    controller.serve(int(owner))
    end_all(folder)
