"""The wheel alone, in a project of somebody's that has nothing of ours beside it: every platform is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import omegaconf
import pytest

from trainer.launch.image_inputs import copy_sources
from trainer.run.folder import RunFolder
from trainer.run.tree_hash import tree_hash

ROOT = Path(__file__).parents[2]
TEMPLATES = ("docker", "jobs", "k8s", "slurm")
FILES = ("LICENSE", "README.md", "constraints.txt", "pyproject.toml")
"""What the recipe of the image reads beside them."""


class Project:
    """A folder that `muster init` filled, and a `muster` from the wheel."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        environment = folder / "environment"
        venv.create(environment, with_pip=False, symlinks=True)
        self.python = environment / "bin/python"
        [packages] = environment.glob("lib/python*/site-packages")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
        # What it depends on is where this interpreter has it; path files there, such as of a clone, are not read.
        (packages / "dependencies.pth").write_text(str(Path(omegaconf.__file__).parents[1]))
        self.packages = packages
        self.muster("init")

    def muster(self, *words: str) -> str:
        """What the command prints."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MUSTER"))}
        argv = [str(self.python), "-m", "muster", *words]
        done = subprocess.run(argv, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in names:
        if name.startswith((*TEMPLATES, *FILES, "trainer/", "muster.py")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*argv, source], check=True, capture_output=True, text=True)
    [wheel] = folder.glob("*.whl")
    return Project(folder, wheel)


def test_it_holds_every_template(project: Project) -> None:
    ours = {name for folder in TEMPLATES for name in (ROOT / folder).rglob("*") if "__pycache__" not in name.parts}
    kept = {
        path.relative_to(project.packages / "trainer/templates") for path in project.packages.rglob("templates/*/**/*")
    }
    files = {Path("sources", name) for name in (*FILES, "muster.py")}
    assert {path.relative_to(ROOT) for path in ours} | files == kept


def test_the_image_is_made_of_the_same_files_as_in_a_clone(project: Project, tmp_path: Path) -> None:
    """Whatever their modes are here: in the image they are root's, and everybody reads them."""
    for path in project.packages.glob("trainer/**/*.py"):
        path.chmod(0o600)
    copy_sources(tmp_path)
    of_wheel = tmp_path.with_name("of wheel")
    program = "import sys, pathlib, trainer.launch.image_inputs as image; image.copy_sources(pathlib.Path(sys.argv[1]))"
    of_wheel.mkdir()
    subprocess.run([project.python, "-c", program, of_wheel], cwd=project.folder, check=True)
    assert tree_hash(of_wheel) == tree_hash(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in of_wheel.rglob("*")} == {0o644, 0o755}
    assert {path.name for path in of_wheel.iterdir()} == {*FILES, "muster.py", "docker", "jobs", "trainer"}


def test_it_trains_and_renders_for_every_platform(project: Project) -> None:
    assert "trainer" in project.muster("render", "job.yaml", "--on", "slurm")
    assert "docker run" in project.muster("render", "job.yaml", "--on", "docker")
    assert "kind: NetworkPolicy" in project.muster(
        "render", "job.yaml", "--on", "kubernetes", "task=trainer.tasks.digits:Digits"
    )
    project.muster("run", "job.yaml")
    [folder] = (path for path in (project.folder / "runs").iterdir() if not path.is_symlink() and path.is_dir())
    assert RunFolder(folder).result.exists()
    assert not list(project.packages.rglob("runs"))
