"""The pages' commands for Docker, typed in a copy of the project, with a real engine."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import documents
import engine_image
import pytest
from engine import Engine
from engine_image import Image

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def named(engine: Engine, image: Image) -> Iterator[None]:
    """The image under the name that the pages give it."""
    engine.docker("tag", image.tag, "muster")
    yield
    made = engine.docker("images", "--format={{.Repository}}:{{.Tag}}", "--filter=reference=muster*").stdout.split()
    engine.docker("rmi", "--force", *(name for name in made if name.startswith(("muster:", "muster-base:"))))


@pytest.mark.parametrize("command", documents.commands("docker"))
@pytest.mark.usefixtures("named")
def test_a_command_for_docker(engine: Engine, wheels: Path, tmp_path: Path, command: str) -> None:
    project = documents.copy_project(tmp_path / "muster")
    if command.startswith("make docker-build"):  # the image is built already, without a network
        command = command.replace("make", "make --dry-run", 1)
    if command == "muster image":
        command = shlex.join(["muster", "image", *engine_image.words(wheels)])
    done = subprocess.run(
        ["bash", "-c", documents.shortened(command, *documents.SHORT)], cwd=project, capture_output=True, text=True,
        env=engine.env | {"PATH": f"{project}/.venv/bin:{engine.env['PATH']}"}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("named")
def test_containers_that_share_no_folder_are_given_the_secret(engine: Engine) -> None:
    """The page's command on two machines; here they are names in a network."""
    (text,) = documents.code(documents.ROOT / "docs/docker.md", "bash")
    make, command = text.replace("\\\n", "").splitlines()
    assert make == "export MUSTER_SECRET=$(openssl rand -hex 32)"
    variables = engine.env | {"MUSTER_SECRET": "0123456789abcdef" * 4}
    engine.docker("network", "create", "machines")
    for node, host in enumerate(("host-a", "host-b")):
        here = command.replace("--network=host", f"--detach --network=machines --name={host} --hostname={host}")
        here = here.replace("NODE_RANK=0", f"NODE_RANK={node}").replace("runs:", f"runs-{host}:")
        engine.docker(*shlex.split(here)[1:], "devices_per_node=1", *documents.SHORT, env=variables)
    codes = engine.docker("wait", "host-a", "host-b").stdout.split()
    printed = [engine.docker("logs", host) for host in ("host-a", "host-b")]
    engine.docker("rm", "host-a", "host-b")
    assert codes == ["0", "0"], [log.stdout + log.stderr for log in printed]
    assert "step 12/12" in printed[0].stdout + printed[0].stderr
