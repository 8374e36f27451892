"""The test engine itself: it is a real one, private, and leaves nothing behind however the tests end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import engine_base
import engine_host
import engine_packages
import pytest
from engine import Engine, cache_folder
from paths import SUPPORT
from stopwatch import Stopwatch

pytestmark = pytest.mark.timeout(600)  # the first test of a session may have to make the base image

# Another session, as its own process: an engine with a container, a volume, a network and a published port.
SESSION = """
import os, sys, time
from pathlib import Path
from engine import running_engine
with running_engine(Path(sys.argv[1])) as engine:
    engine.docker("import", sys.argv[2], "tiny")
    engine.docker("network", "create", "net")
    words = "run --detach --network=net --publish=8000:8000 --volume=data:/data tiny /sleep 600"
    engine.docker(*words.split())
    print(os.getpid(), engine.process_1, engine.socket.parent, flush=True)
    time.sleep(600)
"""


def wait_until(ready, timeout_s: float = 20) -> bool:
    end = time.monotonic() + timeout_s
    while not ready() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(ready())


def processes_in(namespace: str) -> list[int]:
    """Processes in a PID namespace, as this machine numbers them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns/pid") == namespace:
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def test_without_root_the_reason_and_the_remedy_are_told(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(engine_packages.Unavailable, match="needs root: run `sudo"):
        engine_packages.preconditions()


def test_it_runs_containers_with_the_limits_asked_for(engine: Engine):
    show = "cat /proc/1/cgroup /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null"
    done = engine.docker("run", "--rm", "--memory=64m", engine_base.TAG, "sh", "-c", show + "; exit 7", check=False)
    assert done.returncode == 7
    assert str(64 * 1024**2) in done.stdout


def test_containers_find_each_other_by_name(engine: Engine):
    engine.docker("network", "create", "pair")
    serve = ["python3", "-m", "http.server", "8000", "--directory", "/usr/share/python3"]
    engine.docker("run", "--detach", "--network=pair", "--name=node0", engine_base.TAG, *serve)
    fetch = "import time, urllib.request as r\n" + (
        "for _ in range(50):\n"
        "  try: print(r.urlopen('http://node0:8000/').status); break\n"
        "  except OSError: time.sleep(0.1)"
    )
    done = engine.docker("run", "--rm", "--network=pair", engine_base.TAG, "python3", "-c", fetch)
    assert done.stdout == "200\n"


def test_its_network_is_its_own(engine: Engine):
    engine.docker("network", "create", "--opt=com.docker.network.bridge.name=visible0", "seen")
    links = ["ip", "-oneline", "link"]
    assert "visible0" in subprocess.run(engine.inside(*links), capture_output=True, text=True).stdout
    assert "visible0" not in subprocess.run(links, capture_output=True, text=True).stdout


def test_an_unknown_name_fails_at_once(engine: Engine, stopwatch: Stopwatch):
    engine.docker("network", "create", "alone")
    look = "import socket\ntry: socket.getaddrinfo('node9', 1)\nexcept OSError as error: print(error)"
    with stopwatch.at_most(4):
        done = engine.docker("run", "--rm", "--network=alone", engine_base.TAG, "python3", "-c", look)
    assert done.stdout.strip()


def test_a_second_session_waits_for_the_first_and_ends_with_its_tests(engine: Engine, tmp_path: Path):
    (tmp_path / "work").mkdir()
    host = [sys.executable, "-I", str(SUPPORT / "engine_host.py")]
    with subprocess.Popen(
        [*host, str(cache_folder()), str(tmp_path / "work")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as second:
        assert second.stdout.readline().startswith("waiting")
        second.stdin.close()
        second.wait(timeout=10)
        assert not (tmp_path / "work").exists()


@pytest.fixture
def other_session(engine: Engine, tmp_path: Path):
    """Starts SESSION with a cache of its own; gives its process, process 1, work folder and cache."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / engine.root.name).symlink_to(engine.root)
    archive = tmp_path / "tiny.tar"
    subprocess.run(["tar", "--create", f"--file={archive}", *small_root(tmp_path / "root")], check=True)
    session = subprocess.Popen(
        [sys.executable, "-c", SESSION, str(cache), str(archive)],
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    _, process_1, work = session.stdout.readline().split()
    namespace = os.readlink(f"/proc/{process_1}/ns/pid")
    yield session, int(process_1), Path(work), cache
    session.kill()
    session.wait()
    session.stdout.close()
    wait_until(lambda: not processes_in(namespace))
    with open(cache / "lock", "a+") as lock:  # where no further session would
        engine_host.remove_leftovers(lock)


def small_root(folder: Path) -> list[str]:
    """tar's words for the smallest system that can sleep: the program and the libraries that it names."""
    folder.mkdir()
    listed = subprocess.run(["ldd", "/bin/sleep"], capture_output=True, text=True, check=True).stdout
    libraries = [word for word in listed.split() if word.startswith("/")]
    for source in ["/bin/sleep", *libraries]:
        target = folder / ("sleep" if source == "/bin/sleep" else source.lstrip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(source).resolve().read_bytes())
        target.chmod(0o755)
    return [f"--directory={folder}", "."]


@pytest.mark.parametrize("victim", ["tests", "holder", "process 1"])
def test_nothing_is_left_when_something_is_killed(other_session, victim: str):
    session, process_1, work, cache = other_session
    before = processes_in(os.readlink(f"/proc/{process_1}/ns/pid"))
    assert len(before) >= 5  # shell, containerd, dockerd, a shim, the port's proxy, the container
    holder = int(Path(f"/proc/{session.pid}/task/{session.pid}/children").read_text().split()[0])
    os.kill({"tests": session.pid, "holder": holder, "process 1": process_1}[victim], signal.SIGKILL)
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))
    assert str(cache) not in Path("/proc/self/mounts").read_text()
    if victim != "holder":
        assert wait_until(lambda: not work.exists())
        assert not any(Path("/sys/fs/cgroup").glob(f"**/muster-docker-{holder}"))


def test_the_next_session_clears_up_after_a_killed_one(other_session):
    session, _, work, cache = other_session
    holder = int(Path(f"/proc/{session.pid}/task/{session.pid}/children").read_text().split()[0])
    os.kill(holder, signal.SIGKILL)
    assert work.exists()
    program = (
        "import json, sys; from pathlib import Path; from engine import running_engine\n"
        "with running_engine(Path(sys.argv[1])) as engine:\n"
        "    words = ['ps -aq', 'volume ls -q', 'network ls -q --filter=type=custom']\n"
        "    print(json.dumps([engine.docker(*line.split()).stdout for line in words]))\n"
        "    print(engine.docker('images', '--format={{.Repository}}').stdout.strip())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(cache)],
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        capture_output=True,
        text=True,
        check=True,
    )
    left, images = done.stdout.splitlines()
    assert json.loads(left) == ["", "", ""]
    assert images == "tiny"  # what is worth keeping is kept
    assert not work.exists()
    assert not any(Path("/sys/fs/cgroup").glob(f"**/muster-docker-{holder}"))
