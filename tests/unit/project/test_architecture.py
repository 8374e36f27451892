"""The page on the architecture names files that are there, and all packages."""

import re
from pathlib import Path

from paths import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text()


def test_files_that_the_page_names_exist() -> None:
    named = re.findall(r"`((?:trainer|muster\.py|jobs|slurm|docker|k8s|tests|bench)[\w/.]*)`", PAGE)
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert len(named) > 20


def test_every_package_has_a_line() -> None:
    packages = {path.parent.name for path in Path(ROOT, "trainer").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"`trainer/(\w+)/`", PAGE))


def test_every_file_of_python_has_at_most_300_lines() -> None:
    paths = [path for folder in ("trainer", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in paths if len(path.read_text().splitlines()) > 300] == []
