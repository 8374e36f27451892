"""What an image is made of: by that it is known whether one is up to date, without asking an engine."""

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import trainer
from trainer.launch.dockerfile import OURS, dockerfile, sources
from trainer.launch.site import ours
from trainer.run.tree_hash import hash_files, tree_hash

BASE = "muster-base"
"""The name of Muster's own image on this machine."""
FILES = ("LICENSE", "README.md", "constraints.txt", "pyproject.toml", "muster.py")
"""What docker/Dockerfile reads beside docker/lock.txt, jobs and the package."""
DIGITS = 12
"""Of a hash in a tag."""
FOR_BASE = (
    "--add-host", "--build-arg", "--build-context", "--builder", "--network", "--no-cache", "--platform", "--progress",
    "--pull", "--quiet", "-q", "--secret", "--ssh",
)  # fmt: skip
"""Options of docker build that both builds get. The others are about the project's own Dockerfile, such as --target."""


@dataclass(frozen=True)
class Inputs:
    """What the image of a project is made of now."""

    dockerfile: str
    base: str
    """The name of Muster's own image below it; empty if it stands on another one."""
    tag: str
    """A hash of everything."""


def look_at_inputs(folder: Path, words: Sequence[str]) -> Inputs:
    """`words`: more words for docker build."""
    own = folder / "Dockerfile"
    text = own.read_text(errors="replace") if own.is_file() else dockerfile(folder)
    base = _base(of_base(words)) if OURS.search(text) else ""
    parts = [text, hash_files(folder, sources(folder, text)), base, version("muster-train"), *words]
    return Inputs(text, base, _short_hash(parts))


def of_base(words: Sequence[str]) -> list[str]:
    """The words for the build of Muster's own image. A word that is no option belongs to the one before it."""
    kept, keep = [], False
    for word in words:
        keep = word.partition("=")[0] in FOR_BASE if word.startswith("-") else keep
        kept += [word] if keep else []
    return kept


def _base(words: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="muster-image-") as name:
        copy_sources(Path(name))
        parts = [tree_hash(Path(name)), (ours("docker") / "Dockerfile").read_text(), *words]
    return f"{BASE}:{version('muster-train')}-{_short_hash(parts)}"


def _short_hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:DIGITS]


def copy_sources(context: Path) -> None:
    """Bring together what docker/Dockerfile reads, readable for everybody: in an image it is root's."""
    (context / "docker").mkdir()
    shutil.copyfile(ours("docker") / "lock.txt", context / "docker/lock.txt")
    for name in FILES:
        shutil.copyfile(ours(name), context / name)
    left_out = shutil.ignore_patterns("__pycache__", "templates")
    for folder in (ours("jobs"), Path(trainer.__file__).parent):
        shutil.copytree(folder, context / folder.name, ignore=left_out)
    for path in context.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
