"""The project of docs/getting-started.md, made as the page says, and what the page then types on each platform.

The environment is that of the tests, which has what the page installs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from paths import ROOT

PAGE = ROOT / "docs/getting-started.md"


def blocks(section: str) -> list[list[str]]:
    """The commands of a section, block by block."""
    (text,) = re.findall(rf"^##+ {section}\n(.*?)(?=^##)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [block.splitlines() for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


def variables(environment: dict[str, str]) -> dict[str, str]:
    """A shell's, in which `muster` is the command of the tests."""
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def type_command(project: Path, command: str, environment: dict[str, str], timeout_s: float = 400) -> str:
    """What a command prints. It may not fail."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=project, env=variables(environment), capture_output=True, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def make(folder: Path, environment: dict[str, str]) -> Path:
    """Make the project in a folder of its own, but for the environment, which is there."""
    (commands,) = blocks("A project of your own")
    assert re.fullmatch(r"python3 -m venv .*|pip install .*", commands[1]) and commands[2].startswith("pip install ")
    type_command(folder, commands[0], environment)
    project = folder / "digits"
    for command in commands[3:]:
        type_command(project, command, environment)
    (text,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert (project / "training.py").exists()
    (project / "training.py").write_text(text)
    return project


def newest(project: Path) -> Path:
    """The folder of the run that was made last."""
    return max((path.parent for path in project.glob("runs/*/job.yaml")), key=lambda path: path.stat().st_mtime_ns)
