"""`muster image`: the project's image, on top of Muster's own. Each is made anew only when what it is made of changed.

Muster's own is made of docker/Dockerfile and of what that reads: of the clone, or of the wheel, which brings it along.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from trainer.errors import JobError, wrong_choice
from trainer.launch.docker.engine import docker, ensure_engine, refusal
from trainer.launch.image_inputs import copy_sources, look_at_inputs, of_base
from trainer.launch.platform import find_platform
from trainer.launch.pushed import record_push
from trainer.launch.site import ours

STEP = re.compile(r"------\n > (.*)\n((?:.*\n)*?)------\n")
"""Where docker build repeats the step that failed, and what that printed last."""
OFFLINE = "name resolution|network is unreachable|no route to host|failed to resolve source|no matching distribution"
PUSHES = (
    ("denied|unauthorized|authentication required|no basic auth", "does not let you push there",
     "Log in: docker login {registry}"),
    ("server gave http response to https", "speaks HTTP only",
     "Give it a certificate, or add it to insecure-registries of the engine"),
    ("refused|no such host|timeout|timed out|unreachable|name resolution", "does not answer",
     "Is the image of the site file right, and its registry reachable from the engine?"),
)  # fmt: skip


def make_image(on: str | None, site: Path | None, push: bool, words: Sequence[str]) -> Iterator[str]:
    """Make the image that a site file names, and push it; yield what to tell the user.

    `on`: whose site file; `words`: more words for `docker build`. Raises JobError: the engine, the build or the
    registry refused.
    """
    on = on or ("kubernetes" if push else "docker")
    if on not in ("docker", "kubernetes"):
        raise wrong_choice("--on", on, ["docker", "kubernetes"])
    facts = find_platform(on).load_site(site)
    image = getattr(facts, "reference", None) or facts.image
    repository, tag = _split(image)
    if push and "/" not in repository:
        problem = f"names no registry to push to, in the site file for {on}"
        raise JobError("image", image, problem, f"Write registry.example/team/{repository}, or add --on or --site")
    ensure_engine()
    folder = Path.cwd()
    own, made_of = folder / "Dockerfile", look_at_inputs(folder, words)
    base = made_of.base
    if base:
        _make_base(base, words)
    built = f"{repository}:{made_of.tag}"
    if _is_there(built):
        yield f"{built} is up to date"
    else:
        on_base = [f"--build-context={name}=docker-image://{base}" for name in ("muster", "muster:latest") if base]
        if own.is_file():
            _build([*on_base, f"--tag={built}", *words, str(folder)])
        else:
            _build([*on_base, f"--tag={built}", "--file=-", *words, str(folder)], made_of.dockerfile)
        yield f"built {built}"
    docker("tag", built, f"{repository}:{tag}")
    if push:
        digest = _push(built, repository)
        _push(f"{repository}:{tag}", repository)
        record_push(image, digest, made_of.tag, words)
        yield f"pushed {digest}, which jobs on {on} from this folder use"


def _split(image: str) -> tuple[str, str]:
    """Repository and tag. Raises JobError: it names a finished build."""
    if "@" in image or image.startswith("sha256:"):
        raise JobError("image", image, "names a finished build", "Remove the digest in the site file")
    repository, colon, tag = image.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (image, "latest")


def _is_there(image: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0


def _make_base(base: str, words: Sequence[str]) -> None:
    """Make Muster's own image, where it is not there yet."""
    if not _is_there(base):
        print(f"building {base} first, once for this version of Muster", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="muster-image-") as name:
            copy_sources(Path(name))
            recipe, number = ours("docker") / "Dockerfile", version("muster-train")
            _build([f"--file={recipe}", f"--build-arg=VERSION={number}", f"--tag={base}", *of_base(words), name])


def _build(words: Sequence[str], text: str | None = None) -> None:
    """Let docker build, and show what it says. Raises JobError: it failed, with the end of what it said."""
    said: deque[str] = deque(maxlen=200)
    with subprocess.Popen(
        ["docker", "build", *words], stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(text or "")
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            said.append(line)
    if process.returncode:
        raise _failure("".join(said))


def _failure(said: str) -> JobError:
    if "no space left" in said.lower():
        return refusal(said)
    steps = STEP.findall(said)
    step, end = steps[-1] if steps else ("docker build", said)
    lines = [re.sub(r"^[\d.]+ ", "", line).strip() for line in end.splitlines() if line.strip()]
    lines = [line for line in lines if "error" in line.lower()] or lines
    remedy = "Correct the Dockerfile, or what it installs"
    if re.search(OFFLINE, said.lower()):
        remedy = "For another index of packages than pip's own, pass a configuration of pip: "
        remedy += "muster image -- --secret=id=pip.conf,src=FILE"
    if "requires buildkit" in said.lower() or "unknown flag: --mount" in said.lower():
        remedy = "Install docker-buildx: the engine's old builder cannot read this Dockerfile"
    return JobError("Dockerfile", " ".join(step.split()), " / ".join(lines[-3:])[:600], remedy)


def _push(image: str, repository: str) -> str:
    """Push an image; return its name with the digest. Raises JobError: the registry refused."""
    done = subprocess.run(["docker", "push", image], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said, host = " ".join(done.stderr.split()), repository.partition("/")[0]
        registry = host if "." in host or ":" in host or host == "localhost" else "docker.io"
        for pattern, problem, remedy in PUSHES:
            if re.search(pattern, said.lower()):
                raise JobError("image", image, f"{registry} {problem}: {said[-300:]}", remedy.format(registry=registry))
        raise JobError("image", image, f"cannot be pushed: {said[-300:]}", f"Correct it, then run docker push {image}")
    found = docker("image", "inspect", "--format", '{{join .RepoDigests "\\n"}}', image).split()
    names = repository, f"docker.io/{repository}"
    return next((name for name in found if name.partition("@")[0] in names), image)
