"""docker/Dockerfile on a base that has its own torch, and what must not make a difference to the image."""

import os
import re
import time
from pathlib import Path

import engine_base
import engine_image
import pytest
from engine import Engine

pytestmark = pytest.mark.timeout(600)

BASE = "muster-test-torch-base"
TAG = "muster-test-on-torch"
DATED = "--build-arg=SOURCE_DATE_EPOCH=1700000000"
# Stand-ins for what a vendor's image brings: a torch of a version that no index has, and a package that is
# older than the project's pin. Small, because what counts is that the build leaves them alone.
BROUGHT = {"torch": "2.99.0+base", "absl-py": "1.4.0"}
MODULES = {"torch": "torch", "absl-py": "absl"}


@pytest.fixture(scope="module")
def torch_base(engine_session: Engine, tmp_path_factory) -> str:
    context = tmp_path_factory.mktemp("base")
    for name, version in BROUGHT.items():
        (context / MODULES[name]).mkdir()
        (context / MODULES[name] / "__init__.py").write_text(f"__version__ = {version!r}\n")
        metadata = context / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (context / "Dockerfile").write_text(
        f"FROM {engine_base.TAG}\nCOPY . /usr/local/lib/python{engine_base.PYTHON}/dist-packages/\n"
    )
    engine_session.docker("build", f"--tag={BASE}", context)
    return BASE


SITE = f"/opt/muster/venv/lib/python{engine_base.PYTHON}/site-packages"


def output(engine: Engine, *words: str) -> str:
    first, *rest = words
    return engine.docker("run", "--rm", f"--entrypoint={first}", TAG, *rest).stdout


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """The project with few dependencies: what is shown here does not depend on how many there are."""
    context = engine_image.copy_context(tmp_path)
    text = (context / "pyproject.toml").read_text()
    few = 'dependencies = ["torch>=2.10", "absl-py", "submitit"]'
    lock = (context / "docker/lock.txt").read_text()
    keep = "absl-py|submitit|cloudpickle|typing-extensions|dumb-init|pip|setuptools"
    (context / "docker/lock.txt").write_text("\n".join(re.findall(rf"^(?:{keep})==.*(?:\n .*)*", lock, re.M)) + "\n")
    (context / "pyproject.toml").write_text(
        re.sub(r"^dependencies = \[.*?^\]", few, text, flags=re.DOTALL | re.MULTILINE)
    )
    return context


def test_what_the_base_brings_is_kept(engine: Engine, wheels: Path, torch_base: str, context: Path):
    engine_image.build(engine, wheels, DATED, context=context, tag=TAG, base=torch_base)
    show = "import torch, absl, submitit, trainer; print(torch.__version__, absl.__version__)"
    assert output(engine, "python", "-c", show).split() == list(BROUGHT.values())
    assert not {"torch", "absl"} & set(output(engine, "ls", SITE).split())
    assert output(engine, "pip", "--version").split()[3].startswith(SITE)
    assert f"pkg:pypi/torch@{BROUGHT['torch']}" in output(engine, "cat", "/opt/muster/bom.cdx.json")


def test_equal_input_gives_an_equal_image(engine: Engine, wheels: Path, torch_base: str, context: Path):
    # Both from nothing: above a layer of the cache the engine leaves out folders that differ in their dates alone.
    first = engine_image.build(engine, wheels, DATED, "--no-cache", context=context, tag=TAG, base=torch_base)
    for path in [*context.rglob("*"), context]:  # another checkout has other dates
        os.utime(path, (time.time() - 1000, time.time() - 1000))
    # Nor may the password of an index leave a trace.
    secret = context.with_name("pip.conf")
    secret.write_text("[global]\nextra-index-url = http://user:password@127.0.0.1:9/simple\n")
    words = (DATED, "--no-cache", f"--secret=id=pip.conf,src={secret}")
    layers = engine.inspect(TAG)["RootFS"]["Layers"]
    again = engine_image.build(engine, wheels, *words, context=context, tag=TAG, base=torch_base)
    assert engine.inspect(TAG)["RootFS"]["Layers"] == layers  # says which layer, when one differs
    assert again.id == first.id
