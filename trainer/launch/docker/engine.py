"""The `docker` command, through which all requests to the engine go. A refusal becomes an error with a remedy."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

from trainer.errors import JobError


def check_engine(image: str, registry: bool, gpus: bool) -> None:
    """Check that the engine can run this image.

    `registry`: whether the image comes from one; `gpus`: whether the containers need GPUs.

    Raises:
        JobError: it cannot; with the remedy.
    """
    if shutil.which("docker") is None:
        raise JobError("--on", "docker", "this machine has no docker command", "Install Docker, or use --on local")
    docker(["version", "--format", "{{.Server.Version}}"])
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode:
        remedy = (
            f"Run docker pull {image}"
            if registry
            else "Run make docker-build, or set another image in docker/site.yaml"
        )
        raise JobError("image", image, "is not on this machine", remedy)
    if gpus and "nvidia" not in docker(["info", "--format", "{{json .Runtimes}} {{json .CDISpecDirs}}"]):
        raise refusal(["info"], "could not select device driver")


REFUSALS = (
    ("permission denied while trying to connect", "your user may not use the engine's socket",
     "Add yourself to the group docker (sudo usermod -aG docker $USER) and log in again"),
    ("cannot connect", "the engine does not answer", "Start it: sudo systemctl start docker"),
    ("no space left", "the engine's disk is full", "Free it with docker system prune, or give it more space"),
    ("could not select device driver", "the engine cannot give GPUs to containers",
     "Install the NVIDIA container toolkit, or set device=cpu"),
)  # fmt: skip


def docker(argv: list[str]) -> str:
    """Run a docker command and return what it prints.

    Raises:
        JobError: it failed; the remedy depends on the message.
    """
    done = subprocess.run(["docker", *argv], capture_output=True, text=True)
    if done.returncode:
        raise refusal(argv, done.stderr)
    return done.stdout


def refusal(argv: list[str], message: str) -> JobError:
    """The error for a message of docker."""
    text = " ".join(message.split())
    for pattern, problem, remedy in REFUSALS:
        if pattern in text.lower():
            return JobError("--on", "docker", problem, remedy)
    return JobError("docker", " ".join(argv), text[:400], "Correct docker/site.yaml")


def run_quietly(command: list[str]) -> None:
    """Run a command whose failure means that there was nothing to do."""
    with contextlib.suppress(OSError):
        subprocess.run(command, capture_output=True)
