"""`muster image` in a project of somebody's, with a real engine and a real registry; runs get exactly what it made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import engine_image
import first_project
import pytest
from docker_runs import events
from engine import Engine
from engine_image import Image
from engine_servers import registry
from paths import ROOT

from trainer.records import read_json
from trainer.run.folder import RunFolder

pytestmark = pytest.mark.timeout(600)

REGISTRY = "127.0.0.1:5001"
GUARDED = "127.0.0.1:5002"


class Project:
    """The project of docs/getting-started.md, whose dependency Muster's image lacks, and a secret in it.

    What the page has from an index is a file here: builds of the tests have no network.
    """

    def __init__(self, folder: Path, engine: Engine, wheels: Path) -> None:
        self.engine = engine
        self.words = engine_image.words(wheels)
        self.library = folder / "library"  # which is nowhere but on the path of the machine that submits
        self.library.mkdir()
        (self.library / "stems.py").write_text("")
        self.folder = first_project.make(folder, engine.env)
        self.requirements = f"scikit-learn\n./{engine_image.bring_wheel('einops', self.folder)}\n-e .\n"
        self.write("requirements.txt", self.requirements)
        (self.folder / "Dockerfile").unlink()
        self.muster("init")
        self.write(".env", "KEY=secret\n")
        self.write("training.py", "import stems\n" + (self.folder / "training.py").read_text())

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        return self.engine.env | {"PYTHONPATH": f"{ROOT}:{self.library}"}

    def muster(self, *words: str, fails: bool = False) -> str:
        """What the command prints; of one that fails its last line, the error."""
        done = subprocess.run(
            [sys.executable, "-m", "muster", *words], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=400, umask=0o077,
        )  # fmt: skip
        assert done.returncode == (64 if fails else 0), done.stdout + done.stderr
        return done.stderr.splitlines()[-1] if fails else done.stdout

    def image(self, *words: str, fails: bool = False) -> str:
        return self.muster("image", *words, *self.words, fails=fails)

    def run(self) -> RunFolder:
        ((_, command),) = first_project.blocks("In containers")
        self.muster(*command.split()[1:], "train.epochs=1")
        return RunFolder(first_project.newest(self.folder))


@pytest.fixture(scope="module")
def project(
    engine_session: Engine, image: Image, wheels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """`image`: its layers are what Muster's own image is made of here, too."""
    yield Project(tmp_path_factory.mktemp("of somebody"), engine_session, wheels)
    listed = engine_session.docker("images", "--format", "{{.Repository}}:{{.Tag}}").stdout.split()
    ours = [name for name in listed if name.startswith(("muster-base:", "digits:", REGISTRY))]
    engine_session.docker("rmi", "--force", *ours)


def test_it_is_built_when_what_it_needs_has_changed_and_a_run_keeps_its_own(project: Project, image: Image) -> None:
    assert "is not on this machine. Run muster image" in project.muster("run", "job.yaml", "--on", "docker", fails=True)
    ((command, _),) = first_project.blocks("In containers")
    built = project.muster(*command.split()[1:], *project.words).removeprefix("built ").strip()
    inspect = project.engine.inspect
    bases = project.engine.docker("images", "--quiet", "--no-trunc", "muster-base").stdout.split()
    assert image.id in bases, "what the tests build of docker/Dockerfile"
    assert inspect(built)["Id"] == inspect("digits")["Id"]
    assert inspect(built)["Config"]["User"] == "10001:10001"
    listed = project.engine.docker("run", "--rm", "--entrypoint=ls", built, "-A", "/workspace").stdout.split()
    assert "requirements.txt" in listed and not {".env", "training.py"} & set(listed)
    project.write("training.py", (project.folder / "training.py").read_text() + "EDITED = True\n")
    assert project.image() == f"{built} is up to date\n"

    run = project.run()
    assert run.result.exists() and not events(run.path, "failure")
    pinned = read_json(run.plan / "docker.json")
    assert pinned and pinned["image"] == inspect(built)["Id"]
    assert (run.code / ".muster/packages/stems.py").exists(), "it comes with the code"

    project.write("requirements.txt", project.requirements + "not a name\n")
    line = project.image(fails=True)
    assert line.startswith("ERROR: Dockerfile=") and "Invalid requirement: 'not a name'" in line


def test_what_is_pushed_is_what_a_cluster_gets(project: Project, tmp_path: Path) -> None:
    name = f"{REGISTRY}/team/digits"
    project.write("k8s/site.yaml", f"image: {name}:1\n")
    project.write("Dockerfile", "FROM scratch\nCOPY requirements.txt /\n")  # a gigabyte would take a minute to push
    assert "does not answer" in project.image("--push", fails=True)
    engine = project.engine
    with registry(engine, tmp_path / "registry", REGISTRY):
        said = project.image("--push")
        digest = said.splitlines()[-1].split()[1].rstrip(",")
        assert digest.startswith(f"{name}@sha256:")
        assert f"image: {digest}" in project.muster("render", "job.yaml", "--on", "kubernetes").replace('"', "")
        here = engine.inspect(f"{name}:1")["Id"]
        engine.docker("rmi", "--force", here)
        for pulled in (digest, f"{name}:1"):
            engine.docker("pull", pulled)
            assert engine.inspect(pulled)["Id"] == here
    project.write("k8s/site.yaml", f"image: {GUARDED}/digits\n")
    guard = f"auth: {{htpasswd: {{realm: team, path: {tmp_path / 'passwords'}}}}}"
    with registry(engine, tmp_path / "guarded", GUARDED, guard):
        assert f"docker login {GUARDED}" in project.image("--push", fails=True)
