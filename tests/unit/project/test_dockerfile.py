"""docker/Dockerfile's first program, which decides what is installed, on the Python of this machine and on 3.10."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.parametrize("before", ["", "import sys; sys.modules['tomllib'] = None\n"], ids=["tomllib", "as on 3.10"])
def test_requirements_come_from_the_project(tmp_path: Path, before: str) -> None:
    (program,) = re.findall(r"python3 <<'PYTHON'\n(.*?)^PYTHON$", (ROOT / "docker/Dockerfile").read_text(), re.M | re.S)
    command = [sys.executable, "-c", before + program.replace("/mnt", str(ROOT))]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert any(line.startswith("omegaconf") for line in (tmp_path / "install.txt").read_text().splitlines())
    tools, hashed = ((tmp_path / name).read_text() for name in ("tools.txt", "hashed.txt"))
    assert re.findall("^[a-z-]+(?===)", tools, re.M) == ["dumb-init", "pip", "setuptools"]
    assert "--hash=sha256:" in tools and "dumb-init==" not in hashed
    # The tests' environment is such a base: its torch stays, and nothing that came with it is pinned anew.
    import torch

    pins = (tmp_path / "pins.txt").read_text().splitlines()
    assert "numpy==" not in hashed
    assert f"torch=={torch.__version__}" in pins and not [pin for pin in pins if pin.startswith("numpy==")]
    assert (tmp_path / "venv-options").read_text() == "--system-site-packages"
