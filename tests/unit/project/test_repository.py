"""What holds for the repository as a whole: packages, pins, make targets, and no address of a registry."""

import os
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from paths import ROOT

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings the package that became tomllib
    import tomli as tomllib  # type: ignore[no-redef]

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGE_DATA = PYPROJECT["tool"]["setuptools"]["package-data"]
MAKEFILE = (ROOT / "Makefile").read_text()
PUBLIC = [
    target for target in re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.M) if target not in ("setup-dev", "setup-bench")
]


def pins() -> dict[str, Requirement]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    apply = [pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): pin for pin in apply}


def needed(requirements: list[Requirement]) -> dict[str, str]:
    """Name -> installed version of what the requirements bring here, transitively."""
    found: dict[str, str] = {}
    todo = [(requirement, "") for requirement in requirements]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        installed = distribution(name)
        found[name] = installed.version
        for extra in requirement.extras or {""}:
            todo += [(Requirement(each), extra) for each in installed.requires or []]
    return found


def test_every_package_that_set_up_brings_is_pinned_to_what_is_installed() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    installed = {
        name: version
        for name, version in needed([Requirement(line) for line in wanted]).items()
        if not re.match("nvidia-|cuda-|triton$", name)  # a CUDA build of torch pins these itself
    }
    exact = pins()
    assert sorted(installed.keys() - exact.keys()) == []
    assert [name for name, version in installed.items() if not exact[name].specifier.contains(version, True)] == []


def test_the_pins_are_exact_and_within_the_bounds_that_users_see() -> None:
    exact = pins()
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["bench"]]:
        requirement = Requirement(line)
        (pin,) = exact[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(Version(pin.version)), line


def test_pyproject_names_every_package() -> None:
    there = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("trainer/**/__init__.py")}
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == there | set(setuptools["package-dir"])


def test_pyproject_names_every_file_of_the_packages_that_is_no_module() -> None:
    said = {f"{package.replace('.', '/')}/{glob}" for package, globs in PACKAGE_DATA.items() for glob in globs}
    modules = {path for path in ROOT.glob("trainer/**/*.py") if (path.parent / "__init__.py").exists()}
    there = {path for path in ROOT.glob("trainer/**/*") if path.is_file() and path.suffix != ".pyc"} - modules
    assert there == {path for glob in said for path in ROOT.glob(glob)}


def test_no_folder_of_tests_or_templates_is_a_package() -> None:
    folders = ("tests", "docker", "slurm", "k8s", "jobs")
    assert [path for folder in folders for path in ROOT.glob(f"{folder}/**/__init__.py")] == []


def test_make_alone_explains_every_target() -> None:
    said = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make ([a-z0-9-]+) +\S", said, re.M) == PUBLIC
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, re.M)
    assert phony
    assert set(PUBLIC) <= set(phony[1].replace("\\", " ").split())


@pytest.mark.parametrize("target", PUBLIC)
def test_a_recipe_has_at_most_three_lines(target: str) -> None:
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.M)
    assert recipe
    assert 1 <= len(recipe[1].splitlines()) <= 3


def text_files() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name for name in folders if not re.match(r"\.git$|\.venv|\..*_cache$|__pycache__|runs$|.*egg-info", name)
        ]
        yield from (Path(folder, name) for name in files)


def test_no_file_names_a_registry() -> None:
    """Which registry serves a machine is its own configuration: mirrors and closed networks stay possible."""
    host = re.compile(
        r"(pypi|pythonhosted|npmjs|(deb|security)\.debian|archive\.ubuntu|download\.pytorch|nvcr)\.(org|com|io)\b"
    )
    found = {str(path.relative_to(ROOT)): host.findall(path.read_text(errors="ignore")) for path in text_files()}
    assert {path: hosts for path, hosts in found.items() if hosts} == {}


def test_the_image_gets_the_pinned_versions_by_their_hashes() -> None:
    """All but torch, of which a build may come from any index. `.ci/lock` writes the file anew."""
    blocks = re.findall(r"^(\S+?)==([^ ;]+)(?: ; ([^\\\n]+))? \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
                        (ROOT / "docker/lock.txt").read_text(), re.M)  # fmt: skip
    apply = {name: version for name, version, marker, _ in blocks if not marker or Marker(marker).evaluate()}
    exact = pins()
    assert [name for name, version in apply.items() if not exact[name].specifier.contains(version)] == []
    tools = [*PYPROJECT["dependency-groups"]["image"], *PYPROJECT["build-system"]["requires"]]
    wanted = {canonicalize_name(Requirement(line).name) for line in tools}
    wanted |= {
        name
        for name in needed([Requirement(line) for line in PROJECT["dependencies"]])
        if not re.match("nvidia-|cuda-|triton$|torch$", name)
    }
    assert wanted - apply.keys() == set()
    lines = (ROOT / "docker/lock.txt").read_text().splitlines()
    assert len(lines) == 1 + sum(1 + hashes.count("--hash") for *_, hashes in blocks), "each line is understood"
