"""The pages' commands for Docker, typed in a copy of the project, with a real engine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import documents
import pytest
from engine import Engine
from engine_image import Image

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def named(engine: Engine, image: Image) -> Iterator[None]:
    """The image under the name that the pages give it."""
    engine.docker("tag", image.tag, "muster")
    yield
    engine.docker("rmi", "--force", "muster")


@pytest.mark.parametrize("command", documents.commands("docker"))
@pytest.mark.usefixtures("named")
def test_a_command_for_docker(engine: Engine, tmp_path: Path, command: str) -> None:
    project = documents.copy_project(tmp_path / "muster")
    if command.startswith("make docker-build"):  # the image is built already, without a network
        command = command.replace("make", "make --dry-run", 1)
    done = subprocess.run(
        ["bash", "-c", documents.shortened(command, *documents.SHORT)], cwd=project, capture_output=True, text=True,
        env=engine.env | {"PATH": f"{project}/.venv/bin:{engine.env['PATH']}"}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_of_a_project_of_ones_own(engine: Engine, image: Image, tmp_path: Path) -> None:
    (text,) = documents.code(documents.ROOT / "docs/docker.md", "dockerfile")
    (tmp_path / "Dockerfile").write_text(text.replace("FROM muster", f"FROM {image.tag}"))
    (tmp_path / "requirements.txt").write_text("numpy\n")  # it is there: nothing is downloaded
    (tmp_path / "mine.py").write_text("import os\nprint('mine, as', os.getuid())\n")
    engine.docker("build", "--tag=mine", str(tmp_path))
    done = engine.docker("run", "--rm", "--entrypoint=python", "mine", "-c", "import mine")
    engine.docker("rmi", "--force", "mine")
    assert "mine, as 10001" in done.stdout
