"""The `docker` command, through which all requests to the engine go. A refusal becomes an error with a remedy."""

import contextlib
import shutil
import subprocess

from trainer.errors import JobError

REFUSALS = (
    ("permission denied while trying to connect", "your user may not use the engine's socket",
     "Add yourself to the group docker (sudo usermod -aG docker $USER) and log in again"),
    ("cannot connect", "the engine does not answer", "Start it: sudo systemctl start docker"),
    ("no space left", "the engine's disk is full", "Free it with docker system prune, or give it more space"),
    ("could not select device driver", "the engine cannot give GPUs to containers",
     "Install the NVIDIA container toolkit, or set device=cpu"),
)  # fmt: skip


def check_engine(image: str, registry: bool, gpus: bool) -> None:
    """Check that the engine can run this image. Raises JobError: it cannot; with the remedy.

    `registry`: whether the image comes from one; `gpus`: whether the containers need GPUs.
    """
    if shutil.which("docker") is None:
        raise JobError("--on", "docker", "this machine has no docker command", "Install Docker, or use --on local")
    docker("version", "--format", "{{.Server.Version}}")
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode:
        build = "Run make docker-build, or set another image in docker/site.yaml"
        raise JobError("image", image, "is not on this machine", f"Run docker pull {image}" if registry else build)
    if gpus and "nvidia" not in docker("info", "--format", "{{json .Runtimes}} {{json .CDISpecDirs}}"):
        raise refusal("could not select device driver")


def docker(*argv: str) -> str:
    """Run a docker command and return what it prints. Raises JobError: it failed; the remedy depends on the message."""
    done = subprocess.run(["docker", *argv], capture_output=True, text=True)
    if done.returncode:
        raise refusal(done.stderr, " ".join(argv))
    return done.stdout


def refusal(message: str, command: str = "run") -> JobError:
    text = " ".join(message.split())
    for pattern, problem, remedy in REFUSALS:
        if pattern in text.lower():
            return JobError("--on", "docker", problem, remedy)
    return JobError("docker", command, text[:400], "Correct docker/site.yaml")


def run_quietly(*argv: str) -> None:
    """Run a docker command whose failure means that there was nothing to do."""
    with contextlib.suppress(OSError):
        subprocess.run(["docker", *argv], capture_output=True)
