"""The `docker` command, through which all requests to the engine go. A refusal becomes an error with a remedy."""

import contextlib
import os
import re
import shutil
import subprocess

from trainer.errors import JobError

REFUSALS = (
    ("permission denied while trying to connect", "your user may not use the engine's socket",
     "Add yourself to the group docker (sudo usermod -aG docker $USER) and log in again"),
    ("cannot connect", "the engine does not answer", "Start it: sudo systemctl start docker"),
    ("no space left", "the engine's disk is full", "Free it with docker system prune, or give it more space"),
    ("address pool|pools have been fully subnetted", "the engine has no addresses left for the network of another run",
     "Remove networks that nobody uses: docker network prune; or set network in docker/site.yaml to host, or to the "
     "name of a network that exists"),
    ("bind source path does not exist|mounts denied|statfs", "the engine does not see the files of this machine",
     "It runs elsewhere, or in a VM or sandbox that sees some folders only (DOCKER_HOST, docker context, snap, Docker "
     "Desktop): share the folder of the runs and the mounts with it, or set runs=... to a folder that it sees"),
    ("newuidmap|newgidmap|subuid|subgid|user namespace|userns", "the engine's user namespaces do not fit",
     "Give your user ids in /etc/subuid and /etc/subgid, or set extra_args: [--userns=host] in docker/site.yaml"),
    ("could not select device driver", "the engine cannot give GPUs to containers",
     "Install the NVIDIA container toolkit, or set device=cpu"),
)  # fmt: skip


def ensure_engine() -> None:
    """Raises JobError: there is no docker command, or no engine that answers it."""
    if shutil.which("docker") is None:
        raise JobError("--on", "docker", "this machine has no docker command", "Install Docker, or use --on local")
    docker("version", "--format", "{{.Server.Version}}")


def check_engine(image: str, registry: bool, gpus: bool) -> str:
    """Check that the engine can run this image, and return its id. Raises JobError: it cannot; with the remedy.

    `registry`: whether the image comes from one; `gpus`: whether the containers need GPUs.
    """
    ensure_engine()
    found = subprocess.run(["docker", "image", "inspect", "--format={{.Id}}", image], capture_output=True, text=True)
    if found.returncode:
        build = "Run muster image, or set another image in docker/site.yaml"
        raise JobError("image", image, "is not on this machine", f"Run docker pull {image}" if registry else build)
    if gpus and "nvidia" not in docker("info", "--format", "{{json .Runtimes}} {{json .CDISpecDirs}}"):
        raise refusal("could not select device driver")
    return found.stdout.strip()


def docker(*argv: str) -> str:
    """Run a docker command and return what it prints. Raises JobError: it failed; the remedy depends on the message."""
    done = subprocess.run(["docker", *argv], capture_output=True, text=True)
    if done.returncode:
        raise refusal(done.stderr, " ".join(argv))
    return done.stdout


def refusal(message: str, command: str = "run") -> JobError:
    text = " ".join(message.split())
    for pattern, problem, remedy in REFUSALS:
        if re.search(pattern, text.lower()):
            return JobError("--on", "docker", problem, remedy)
    return JobError("docker", command, text[:400], "Correct docker/site.yaml")


def user_options() -> list[str]:
    """Options of `docker run` that make a container's user the one of here, whose files the run folder holds.

    Where the engine maps users, the number of a user here is somebody else's inside. A rootless engine runs as the user
    of here, who is root inside. Groups beside the first one are those of here: data may be readable through one alone.
    """
    user = f"--user={os.getuid()}:{os.getgid()}"
    groups = [f"--group-add={group}" for group in sorted({*os.getgroups()} - {os.getgid()})]
    if shutil.which("docker") is None:  # for a rendering; nothing is started here
        return [user, *groups]
    if "podman" in _ask("--version").lower():
        rootless = "true" in _ask("info", "--format", "{{.Host.Security.Rootless}}")
        return ["--userns=keep-id", user, "--group-add=keep-groups"] if rootless else [user, *groups]
    security = _ask("info", "--format", "{{json .SecurityOptions}}")
    if "name=rootless" in security:
        return ["--userns=host", "--user=0:0"]
    return ["--userns=host"] * ("name=userns" in security) + [user, *groups]


def _ask(*argv: str) -> str:
    """What a docker command prints; nothing when it fails: who submits is told by `check_engine`."""
    with contextlib.suppress(OSError):
        return subprocess.run(["docker", *argv], capture_output=True, text=True).stdout
    return ""


def run_quietly(*argv: str) -> None:
    """Run a docker command whose failure means that there was nothing to do."""
    with contextlib.suppress(OSError):
        subprocess.run(["docker", *argv], capture_output=True)
