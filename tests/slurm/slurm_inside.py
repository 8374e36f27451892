"""The inside of the test cluster: process 1 of the controller and of every host, each in namespaces of its own.

Standard library only. Nothing here may be needed after process 1 is gone: the kernel then ends every
process, mount and interface of the cluster, and that is the whole of its clean-up.
"""

import ctypes
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

sys.path.insert(0, str(Path(__file__).parent))  # started as a script in isolated mode
import slurm_config
import slurm_database
from slurm_config import CONTROLLER, STATE, Layout

NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")  # nsenter's --all looks at /proc by our inner process id


def call(*command: object) -> str:
    """Runs a program and returns its output. RuntimeError with its own words when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def wait_for(what: str, ready, timeout_s: float = 30, every_s: float = 0.02) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not after {timeout_s:.0f} s")
        time.sleep(every_s)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((CONTROLLER, port)) == 0


def pid_outside() -> int:
    """This process's id as the rest of the machine knows it: /proc is still the machine's, not our namespace's."""
    return int(os.readlink("/proc/self"))


class Controller:
    """The machine with slurmctld, the database and the switch, and the power buttons of the hosts."""

    def __init__(self, layout: Layout, shared: list[str]):
        self.layout, self.shared = layout, shared
        self.children: dict[int, subprocess.Popen] = {}
        self.hosts: dict[str, tuple[subprocess.Popen, int]] = {}  # name -> (unshare, process 1 seen from outside)

    def start(self) -> None:
        socket.sethostname(CONTROLLER)
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
        call("ip", "link", "set", "lo", "up")
        call("ip", "link", "add", "switch", "type", "bridge", "forward_delay", "0")
        call("ip", "addr", "add", f"{self.layout.address(CONTROLLER)}/24", "dev", "switch")
        call("ip", "link", "set", "switch", "up")
        self.start_munge()
        for name in self.layout.host_names:
            self.launch_host(name)
        if self.layout.accounting:
            slurm_database.start(self.spawn, call, wait_for, listens)
        self.spawn("slurmctld", "slurmctld", "-D", "-i")
        wait_for("slurmctld", lambda: listens(6817))  # a slurmd that comes too early asks again only seconds later
        for name in self.layout.host_names:
            self.connect_host(name)
        wait_for("hosts in service", lambda: self.hosts_in_state("idle") == self.layout.hosts, every_s=0.1)

    def hosts_in_state(self, state: str) -> int:
        done = subprocess.run(["sinfo", "-h", "-p", "normal", "-t", state, "-o", "%D"], capture_output=True, text=True)
        if done.returncode and any(child.poll() is not None for child in self.children.values()):
            raise RuntimeError("a daemon ended while the cluster came up")
        return sum(map(int, done.stdout.split()))

    def spawn(self, log: str, *command: object) -> subprocess.Popen:
        """Starts a daemon that writes to its own log file."""
        with open(STATE / f"log/{log}.out", "a") as out:
            child = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self.children[child.pid] = child
        return child

    def start_munge(self) -> None:
        # One munged serves all hosts through its socket: they are one trust domain and one kernel.
        key = STATE / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        os.mkdir("/run/munge", 0o755)
        files = {"key-file": "key", "log-file": "log", "seed-file": "seed", "pid-file": "pid"}
        self.spawn("munged", "munged", "--foreground", *(f"--{k}={STATE / 'munge' / v}" for k, v in files.items()))
        wait_for("munged", lambda: os.path.exists("/run/munge/munge.socket.2"))

    def launch_host(self, name: str) -> None:
        """Powers a host on, without its network."""
        unshare = ["unshare", *NAMESPACES, "--fork", "--kill-child=KILL"]
        child = subprocess.Popen(
            [*unshare, sys.executable, "-I", __file__, "host", name, self.layout.address(name), json.dumps(self.shared)],
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
        # Made on the host's side, because "netns 1" names this process whatever the rest of the machine calls it.
        call("nsenter", "--target", pid, "--net", *f"ip link add eth0 type veth peer name {name} netns 1".split())
        call("ip", "link", "set", name, "master", "switch", "up")
        if child.stdout.readline() != "connected\n":
            raise RuntimeError(f"host {name} did not come up")
        self.start_slurmd(name)
        return pid

    def start_slurmd(self, name: str) -> None:
        self.spawn(f"slurmd.{name}", "nsenter", "--target", self.hosts[name][1], *NAMESPACES, "slurmd", "-D")

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

        wait_for(f"power-off of {name}", gone, 20)

    def reap(self) -> None:
        """Collects whatever ended: daemons that we know, and orphans that process 1 inherits."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            child = self.children.pop(ended.si_pid, None)
            child.wait() if child else os.waitpid(ended.si_pid, 0)

    def serve(self, owner: int, folder: str) -> None:
        """Obeys requests, one JSON list a line, until the owner hangs up or ends, in whatever way."""
        requests = {"boot": self.boot, "power_off": self.power_off, "start_slurmd": self.start_slurmd}
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(owner, select.POLLIN)  # a pidfd: readable when its process has ended, kill -9 included
        while True:
            ready = {fd for fd, _ in poll.poll(500)}
            self.reap()
            if owner in ready:
                break
            if 0 in ready:
                line = sys.stdin.readline()
                if not line:
                    break
                request, *arguments = json.loads(line)
                try:
                    answer = {"result": requests[request](*arguments)}
                except Exception as error:
                    answer = {"error": f"{request}: {error}"}
                print(json.dumps(answer), flush=True)
        os.kill(-1, signal.SIGKILL)  # everything in this namespace but us
        while True:
            try:
                os.wait()
            except ChildProcessError:
                break
        shutil.rmtree(folder, ignore_errors=True)  # nobody is left to write into it


def last_words() -> str:
    """The end of every daemon's log, for a cluster that did not come up."""
    logs = sorted(STATE.glob("log/*"))
    return "\n".join(f"== {log.name}\n" + "".join(log.read_text(errors="replace").splitlines(True)[-8:]) for log in logs)


def run_host(name: str, address: str, shared: list[str]) -> None:
    """Process 1 of a compute host: own name, address, /proc, /dev/shm and /tmp; then it only collects orphans."""
    print(pid_outside(), flush=True)
    socket.sethostname(name)
    call("mount", "-t", "proc", "proc", "/proc")
    call("mount", "-t", "tmpfs", "-o", "mode=1777", "shm", "/dev/shm")
    private = STATE / f"tmp.{name}"
    private.mkdir(exist_ok=True)
    call("mount", "-t", "tmpfs", "-o", "mode=1777", "tmp", private)
    for path in shared:  # what all hosts see stays shared even where it lies under /tmp
        if path.startswith("/tmp/"):
            (private / path[5:]).mkdir(parents=True, exist_ok=True)
            call("mount", "--rbind", path, private / path[5:])
    call("mount", "--move", private, "/tmp")
    call("ip", "link", "set", "lo", "up")
    wait_for("network cable", lambda: "eth0:" in Path("/proc/net/dev").read_text())
    call("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    call("ip", "link", "set", "eth0", "up")
    print("connected", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then leaves no zombies
    while True:
        signal.pause()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    os.chdir("/")
    if role == "host":
        name, address, shared_paths = arguments
        run_host(name, address, json.loads(shared_paths))
    else:
        options, shared_paths, owner_fd, session_folder = arguments
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends us
        controller = Controller(Layout(**json.loads(options)), json.loads(shared_paths))
        try:
            controller.start()
            pids = {name: pid for name, (_, pid) in controller.hosts.items()}
            print(json.dumps({"result": {**pids, CONTROLLER: pid_outside()}}), flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{error}\n{last_words()}"}), flush=True)
        controller.serve(int(owner_fd), session_folder)
