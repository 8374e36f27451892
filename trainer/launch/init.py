"""`muster init`: the few files that a project wants to own. Nothing that is there already is changed."""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from trainer.errors import JobError, some_of
from trainer.launch.dockerfile import dockerfile, unread

TEXTS = Path(__file__).with_name("project")
JOB = "job.yaml"
IGNORE = ".dockerignore"
IGNORED = re.compile(r"/?runs(/\**)?")
"""A line of .gitignore that leaves the run folders out."""


@dataclass(frozen=True)
class Piece:
    """A file to write, and what to say of it."""

    name: str
    text: str
    purpose: str


def init(folder: Path, script: str | None) -> list[str]:
    """Write what the project in `folder` lacks, for a task or for a script; return what to tell the user.

    Raises JobError: there is no such folder, or it may not be written.
    """
    if not folder.is_dir():
        raise JobError("FOLDER", str(folder), "there is no such folder", "Make it first")
    if script is not None and (Path(script).is_absolute() or not script.endswith(".py") or ".." in Path(script).parts):
        raise JobError("--script", script, "is no Python file of the project", "Give a path inside of it: train.py")
    try:
        said = [_write(folder, piece) for piece in _pieces(folder, script)]
        said += [*_ignore_runs(folder), *_notes(folder)]
    except OSError as error:
        raise JobError("FOLDER", str(folder), f"cannot be written: {error}", "Choose a folder of yours") from None
    if script is not None and f"script: {script}" not in (folder / JOB).read_text(errors="replace"):
        said.append(f"NOTE   {JOB} was there and runs something else: let it say `script: {script}`, and no task")
    here = "" if folder.resolve() == Path.cwd().resolve() else f"cd {shlex.quote(str(folder))} && "
    edited = script or _stub(folder)[0]
    return [*said, f"Edit {edited} first, then {JOB}. Try it: {here}muster run {JOB}"]


def _pieces(folder: Path, script: str | None) -> Iterator[Piece]:
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")[:40] or "project"
    if script is None:
        stub, task = _stub(folder)
        yield Piece(JOB, _fill("task-job.yaml", name=name, task=task), "what to train, how, and on what")
        yield Piece(stub, _fill("task.py"), "the model, its data and the loss")
    else:
        yield Piece(JOB, _fill("script-job.yaml", name=name, script=script), "what to run, and on what")
        yield Piece(script, _fill("script.py"), "the training, in a loop of your own")
    for platform in ("slurm", "docker", "k8s"):
        yield Piece(f"{platform}/site.yaml", _fill(f"{platform}-site.yaml", name=name), "facts about your cluster")
    yield Piece("Dockerfile", dockerfile(folder), "the image: Muster's, and what the project needs")
    yield Piece(IGNORE, _fill("dockerignore"), "what the image is built without: runs, secrets ...")
    makefile = _fill("Makefile", name=name)
    if (folder / "Makefile").exists() and (folder / "Makefile").read_text(errors="replace") != makefile:
        yield Piece("muster.mk", makefile, "targets for your Makefile, which takes them by `include muster.mk`")
    else:
        yield Piece("Makefile", makefile, "targets: train, slurm-submit, docker-run, k8s-apply ...")


def _fill(text: str, **values: str) -> str:
    found = (TEXTS / text).read_text(encoding="utf-8")
    return found if text.endswith(".py") else Template(found).substitute(values)


def _write(folder: Path, piece: Piece) -> str:
    path = folder / piece.name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(piece.text)
    except FileExistsError:
        return f"kept   {piece.name}: it was there"
    return f"wrote  {piece.name}: {piece.purpose}"


def _stub(folder: Path) -> tuple[str, str]:
    """The file for a task, and how the job names it: in the package of `src`, if there is one."""
    packages = sorted(path.parent for path in folder.glob("src/*/__init__.py"))
    if packages:
        return f"src/{packages[0].name}/training.py", f"{packages[0].name}.training:Training"
    return ("src/" if (folder / "src").is_dir() else "") + "training.py", "training:Training"


def _ignore_runs(folder: Path) -> Iterator[str]:
    """Everything that git does not ignore is copied for the nodes, so it must ignore the run folders."""
    path = folder / ".gitignore"
    text = path.read_text(errors="surrogateescape") if path.exists() else ""
    if any(IGNORED.fullmatch(line.strip()) for line in text.splitlines()):
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if not text or text.endswith("\n") else "\n") + "/runs/\n")
    yield "wrote  .gitignore: a line for runs/"


def _notes(folder: Path) -> Iterator[str]:
    lines = (folder / IGNORE).read_text(errors="replace").splitlines()
    taken = [line for line in _fill("dockerignore").splitlines() if line[0] not in "#!" and line not in lines]
    if taken and "*" not in lines:  # which leaves everything out, but for what it names
        which = some_of(taken, 4)
        yield f"NOTE   {IGNORE} lacks {which}: what is called so gets into the image. Add {TEXTS / 'dockerignore'}"
    if (name := unread(folder)) is not None:
        yield f"NOTE   {name} is not read for packages: name them in requirements.txt, and in the Dockerfile"
    if (folder / "trainer.py").exists() or (folder / "trainer").is_dir():
        yield "NOTE   scripts get your own module trainer; a task must not import it, because Muster's has that name"
    if sys.prefix == sys.base_prefix:
        yield "NOTE   this Python is no virtual environment of the project; nodes of a cluster would use the same one"
