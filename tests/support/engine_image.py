"""The project's image for the tests: wheels downloaded beforehand, and a build without any network."""

import hashlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import engine_base
from engine import Engine
from engine_packages import Unavailable

ROOT = Path(__file__).parents[2]
TAG = "muster-test"
BUILD_TIMEOUT_S = 400


@dataclass(frozen=True)
class Image:
    """A finished build: `tag` to run, `id` that changes with the content, `seconds` that the build took."""

    tag: str
    id: str
    seconds: float


def project(root: Path = ROOT) -> dict:
    """pyproject.toml as it is parsed."""
    import tomllib  # not in Python 3.10, which `wheels` refuses first

    return tomllib.loads((root / "pyproject.toml").read_text())


def wheels(cache: Path) -> Path:
    """Folder with every wheel that the image's build installs, downloaded once per set of requirements.

    Raises Unavailable when pip cannot bring them.
    """
    if f"{sys.version_info[0]}.{sys.version_info[1]}" != engine_base.PYTHON:
        raise Unavailable(f"the base image has Python {engine_base.PYTHON}: run the tests with that version")
    metadata = project()
    wanted = [
        *metadata["build-system"]["requires"],
        *metadata["project"]["dependencies"],
        *metadata["dependency-groups"]["image"],
    ]
    constraints = ROOT / "constraints.txt"
    digest = hashlib.sha256("\n".join([*wanted, constraints.read_text()]).encode()).hexdigest()[:12]
    folder = cache / f"wheels-{digest}"
    if folder.exists():
        return folder
    part = cache / "wheels.part"
    shutil.rmtree(part, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--only-binary",
        ":all:",
        "--dest",
        str(part),
    ]
    command += ["--constraint", str(constraints), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise Unavailable(
            f"pip cannot download the image's wheels; is a package index reachable?\n{done.stderr[-2000:]}"
        )
    for old in cache.glob("wheels-*"):
        shutil.rmtree(old)
    part.rename(folder)
    return folder


def bring_wheel(name: str, folder: Path) -> str:
    """Download one package's wheel, in the version of constraints.txt, and return the file's name."""
    words = ["--quiet", "--no-deps", "--only-binary=:all:", f"--constraint={ROOT}/constraints.txt", f"--dest={folder}"]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *words, name], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"pip cannot download {name}; is a package index reachable?\n{done.stderr[-2000:]}")
    (path,) = folder.glob(f"{name}-*.whl")
    return path.name


def copy_context(target: Path) -> Path:
    """A copy of what a build reads, to edit in a test."""
    target.mkdir(exist_ok=True)
    for name in ("LICENSE", "README.md", "constraints.txt", "pyproject.toml", "muster.py", ".dockerignore"):
        shutil.copy2(ROOT / name, target / name)
    for name in ("trainer", "jobs", "docker", "k8s", "slurm"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def words(wheel_folder: Path) -> list[str]:
    """What `muster image` needs for a build without a network, of the same layers as `build`."""
    arguments = f"--build-arg=BASE_IMAGE={engine_base.TAG}", "--build-arg=PIP_NO_INDEX=1"
    return ["--", "--network=none", f"--build-context=wheels={wheel_folder}", *arguments]


def build(
    engine: Engine,
    wheel_folder: Path,
    *words: str,
    context: Path = ROOT,
    tag: str = TAG,
    base: str = engine_base.TAG,
) -> Image:
    """Builds docker/Dockerfile without a network, with further `docker build` words.

    Raises RuntimeError with the builder's output when it fails.
    """
    arguments = {"BASE_IMAGE": base, "PIP_NO_INDEX": "1", "VERSION": project(context)["project"]["version"]}
    start = time.monotonic()
    engine.docker(
        "build",
        "--progress=plain",
        "--network=none",
        f"--file={context}/docker/Dockerfile",
        f"--tag={tag}",
        f"--build-context=wheels={wheel_folder}",
        *(f"--build-arg={name}={value}" for name, value in arguments.items()),
        *words,
        context,
        timeout_s=BUILD_TIMEOUT_S,
        # Otherwise the build takes over a date that the tests' own environment carries.
        env={name: value for name, value in engine.env.items() if name != "SOURCE_DATE_EPOCH"},
    )
    return Image(tag, engine.inspect(tag)["Id"], time.monotonic() - start)
