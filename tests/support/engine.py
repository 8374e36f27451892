"""A real container engine for the tests: start it, and call its command line."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import engine_packages

STOP_TIMEOUT_S = 30
PRUNE_TIMEOUT_S = 300
KEEP = "4GB"  # of build cache: three sets of dependencies


def cache_folder() -> Path:
    """Where programs, base image, wheels and the engine's data stay between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "muster-tests" / "docker"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Engine:
    """A running engine. `env` is the environment in which `docker` means this engine and no other."""

    def __init__(self, root: Path, cache: Path, work: Path, process_1: int):
        self.root, self.socket, self.process_1 = root, work / "docker.sock", process_1
        config = cache / "client"  # kept: it holds the name under which the engine remembers build contexts
        config.mkdir(exist_ok=True)
        plugins = str(root / "usr/libexec/docker/cli-plugins")
        (config / "config.json").write_text(json.dumps({"cliPluginsExtraDirs": [plugins]}))
        programs = engine_packages.environment(root)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "COMPOSE_"))}
        self.env |= {"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_CONFIG": str(config)}
        self.env |= {"PATH": f"{root}/usr/bin:{os.environ.get('PATH', programs['PATH'])}"}

    def docker(
        self, *words: object, check: bool = True, timeout_s: float = 240, **options
    ) -> subprocess.CompletedProcess:
        """Runs `docker WORDS...` and returns it with its output as text.

        Raises RuntimeError with the engine's own words on a non-zero exit, unless check is False.
        """
        command = ["docker", *map(str, words)]
        options = {"env": self.env, "stdin": subprocess.DEVNULL} | options
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, **options)
        if check and done.returncode:
            raise RuntimeError(
                f"`{' '.join(command)}` exited {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
            )
        return done

    def inspect(self, name: str) -> dict:
        """What the engine knows of a container, image or network."""
        return json.loads(self.docker("inspect", name).stdout)[0]

    def remove_all(self) -> None:
        """Removes every container, network and volume; images and the build cache stay."""
        if containers := self.docker("ps", "--all", "--quiet").stdout.split():
            self.docker("rm", "--force", "--volumes", *containers)
        self.docker("network", "prune", "--force")
        self.docker("volume", "prune", "--all", "--force")

    def inside(self, *command: object) -> list[str]:
        """The command line that runs a command in the engine's network, where published ports are."""
        return ["nsenter", f"--net=/proc/{self.process_1}/ns/net", "--", *map(str, command)]


@contextmanager
def running_engine(cache: Path) -> Iterator[Engine]:
    """Starts the engine, yields it, and ends it with everything in it, however the body or the tests end.

    Raises engine_packages.Unavailable where none can run, RuntimeError with the engine's log when it fails.
    """
    engine_packages.preconditions()
    root = engine_packages.unpack(cache)
    # Not below the cache: a socket's path must stay under 108 characters.
    work = Path(tempfile.mkdtemp(prefix="muster-docker-", dir="/tmp"))
    holder = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("engine_host.py")), str(cache), str(work)],
        env={**os.environ, **engine_packages.environment(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests, which then end the engine
    )
    try:
        process_1 = _wait_until_ready(holder, cache)
        engine = Engine(root, cache, work, process_1)
        engine.remove_all()  # left by a session that was killed
        engine.docker("image", "prune", "--force", timeout_s=PRUNE_TIMEOUT_S)
        engine.docker("builder", "prune", "--force", f"--keep-storage={KEEP}", timeout_s=PRUNE_TIMEOUT_S)
        yield engine
    finally:
        holder.stdin.close()
        holder.wait(timeout=STOP_TIMEOUT_S)
        holder.stdout.close()


def _wait_until_ready(holder: subprocess.Popen, cache: Path) -> int:
    for line in holder.stdout:
        if line.startswith("ready "):
            return int(line.split()[1])
        print(f"test engine: {line.strip()}", file=sys.stderr, flush=True)
    raise RuntimeError(f"the engine did not start:\n{(cache / 'dockerd.log').read_text()[-4000:]}")
