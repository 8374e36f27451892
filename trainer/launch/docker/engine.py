"""The `docker` command: the one way to the engine. What it refuses becomes an error with a remedy."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

from trainer.errors import JobError


def check_engine(image: str, registry: bool, gpus: bool) -> None:
    """Ask the engine whether it can run this; `registry`: whether the image comes from one, `gpus`: whether it is to
    give them to containers.

    Raises:
        JobError: with the remedy.
    """
    if shutil.which("docker") is None:
        raise JobError("--on", "docker", "there is no docker command here", "Install Docker, or use --on local")
    docker(["version", "--format", "{{.Server.Version}}"])
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode:
        make = f"docker pull {image}" if registry else "make docker-build, or name another in docker/site.yaml"
        raise JobError("image", image, "is not on this machine", make)
    if gpus and "nvidia" not in docker(["info", "--format", "{{json .Runtimes}} {{json .CDISpecDirs}}"]):
        raise refusal(["info"], "could not select device driver")


REFUSALS = (
    ("permission denied while trying to connect", "your user may not use the engine's socket",
     "Join the group docker (sudo usermod -aG docker $USER, then log in again)"),
    ("cannot connect", "no engine answers", "Start it: sudo systemctl start docker"),
    ("no space left", "the engine's disk is full", "Free it with docker system prune, or give it more space"),
    ("could not select device driver", "the engine cannot give GPUs to containers",
     "Install the NVIDIA container toolkit, or set device=cpu"),
)  # fmt: skip


def docker(words: list[str]) -> str:
    """Run a docker command and return what it prints.

    Raises:
        JobError: it failed; the remedy for the usual reasons.
    """
    done = subprocess.run(["docker", *words], capture_output=True, text=True)
    if done.returncode:
        raise refusal(words, done.stderr)
    return done.stdout


def refusal(words: list[str], said: str) -> JobError:
    """What docker said as an error with a remedy."""
    text = " ".join(said.split())
    for pattern, problem, remedy in REFUSALS:
        if pattern in text.lower():
            return JobError("--on", "docker", problem, remedy)
    return JobError("docker", " ".join(words), text[:400], "Correct docker/site.yaml")


def run_quietly(command: list[str]) -> None:
    """Run a command whose failure means that there was nothing to do."""
    with contextlib.suppress(OSError):
        subprocess.run(command, capture_output=True)
