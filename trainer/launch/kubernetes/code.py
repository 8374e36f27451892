"""The user's code as it travels with a run: one tar, in ConfigMaps while it is small, else in the claim's run folder.

Equal trees make equal tars, wherever and whenever; their hash is what each pod compares before it unpacks.
"""

import hashlib
import io
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import JobError
from trainer.launch.archive import Archive, tar_folder
from trainer.launch.kubernetes.site import KubernetesSite
from trainer.launch.platform import Plan
from trainer.launch.snapshot import check_files, take_snapshot
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder

MOUNT = Path("/code")
"""Where the pods have it."""
ARCHIVE = Path("/archive")
"""Where the pods have its parts."""
PART = 180 << 10
"""Bytes in one ConfigMap: `kubectl apply` repeats an object in an annotation, and those may have 256 KiB."""
PARTS = 5
"""ConfigMaps of a run. More than 1 MiB is not what the API server's database is for."""


@dataclass(frozen=True)
class Code(Archive):
    """The code of a run."""

    folder: Path
    """The job file's folder in the pods."""

    @property
    def packed_sha256(self) -> str:
        return hashlib.sha256(self.packed).hexdigest()

    @property
    def fits(self) -> bool:
        """Whether ConfigMaps can hold it."""
        return len(self.packed) <= PART * PARTS

    def parts(self) -> dict[str, bytes]:
        """What each ConfigMap holds, by its key there."""
        begins = range(0, len(self.packed), PART)
        return {f"code.tar.gz.{part}": self.packed[begin : begin + PART] for part, begin in enumerate(begins)}


def travels(site: KubernetesSite, run: RunFolder) -> bool:
    """Whether the pods run the code of here; else that in their image.

    By default they do, but for Muster's own tree, which is what its image is made of. A run that began with the image's
    code goes on with it.
    """
    if run.code.is_dir() or site.code == "snapshot":
        return site.code != "image"
    before = read_json(run.handle) or {}
    return site.code == "auto" and before.get("platform") != "kubernetes" and not _is_of_muster(Path.cwd())


def _is_of_muster(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("muster.py", "trainer/launch/kubernetes", "docker/Dockerfile"))


def pack_code(plan: Plan[KubernetesSite]) -> Code | None:
    """The code of a run, or of the working directory where there is no run yet; None: it stays here.

    Raises JobError: it lacks what the job names, or nothing can bring it to the pods.
    """
    run, site = plan.run, plan.site
    if not travels(site, run):
        return None
    if run.code.is_dir():
        code = _pack(plan, run.code)
    else:
        with tempfile.TemporaryDirectory() as folder:
            copy = RunFolder(Path(folder, "run"))
            copy.plan.mkdir(parents=True)
            here = str(Path.cwd())
            write_json(copy.source, {"working_directory": here, "job_folder": str(plan.job_folder or here)})
            code = _pack(plan, take_snapshot(Path.cwd(), copy, plan.job))
    is_new = not run.source.exists()
    if not code.fits and (site.claim is None or is_new):
        size, most = len(code.packed) >> 10, PART * PARTS >> 10
        problem = f"is {size} KiB when compressed, and ConfigMaps take {most}; {_largest(code)}"
        remedy = "Name a claim in the site file: `muster submit` brings it there"
        if site.claim is not None:
            remedy = "Use `muster submit`, which brings it to the claim: what is rendered can only hold ConfigMaps"
        remedy += "; or leave data out, with .gitignore; or set code: image"
        raise JobError("code", str(Path.cwd()), problem, remedy)
    return code


def _pack(plan: Plan[KubernetesSite], tree: Path) -> Code:
    check_files(plan.job, plan.run, tree, False)
    source = read_json(plan.run.source) or {}
    working = Path(source.get("working_directory", Path.cwd()))
    folder = Path(source.get("job_folder", plan.job_folder or working))
    inside = folder.relative_to(working) if folder.is_relative_to(working) else Path()
    return Code(tar_folder(tree), MOUNT / inside)


def _largest(code: Code) -> str:
    with tarfile.open(fileobj=io.BytesIO(code.tar)) as archive:
        members = sorted(archive.getmembers(), key=lambda member: -member.size)[:3]
    names = [f"{member.name} ({max(1, member.size >> 10)} KiB)" for member in members]
    return f"the largest files are {', '.join(names)}"
