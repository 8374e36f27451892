"""What is sent to another machine: Muster itself, and the user's code.

A parcel is named by its content, so equal ones are sent once.
"""

from functools import cache
from importlib import metadata
from pathlib import Path

import trainer
from trainer.errors import JobError
from trainer.launch.archive import Archive, tar, tar_folder

PACKAGE = Path(trainer.__file__).resolve().parent
TEMPLATES = ("docker", "jobs", "k8s", "slurm")


class Parcel(Archive):
    """What is sent."""

    @property
    def name(self) -> str:
        """The beginning of its hash."""
        return self.sha256[:16]


def pack_folder(folder: Path) -> Parcel:
    """All files and links below a folder."""
    return Parcel(tar_folder(folder))


@cache
def pack_muster() -> Parcel:
    """Our own package, with its templates and the metadata by which submitit finds its environment."""
    roots = [PACKAGE] + [folder for name in TEMPLATES if (folder := PACKAGE.parent / name).is_dir() and _in_sources()]
    found = [path for root in roots for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files = [(str(path.relative_to(PACKAGE.parent)), path) for path in (*found, PACKAGE.parent / "muster.py")]
    every = metadata.distributions(name="muster-train")  # a checkout may have two: one, an .egg-info, is of a build
    about = next((each for each in every if each.read_text("METADATA")), None)
    if about is None:
        raise JobError("ssh", None, "Muster itself is not installed here, so it cannot be sent", "pip install it")
    for path in about.files or ():
        if path.name in ("METADATA", "entry_points.txt") and path.parent.name.endswith(".dist-info"):
            files.append((f"{path.parent.name}/{path.name}", Path(str(about.locate_file(path)))))
    return Parcel(tar((name, path) for name, path in files if path.is_file()))


def _in_sources() -> bool:
    """Whether we run from a checkout, where the templates lie beside the package."""
    return not (PACKAGE / "templates").is_dir()
