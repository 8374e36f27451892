"""A project of a few bytes with the real .ci/setup and Makefile: real environments, in seconds, offline.

Its torch, its tool and its build backend are stand-ins; nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from paths import ROOT

HAS_GPU = any(map(os.path.exists, ("/dev/nvidiactl", "/proc/driver/nvidia")))

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""

BACKEND = '''
import os, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    info = "stand_in-1.dist-info"
    with zipfile.ZipFile(f"{folder}/stand_in-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("stand_in.pth", os.getcwd())
        wheel.writestr(f"{info}/METADATA", """Metadata-Version: 2.1
Name: stand-in
Version: 1
Requires-Dist: torch
Requires-Dist: tool; extra == "dev"
Provides-Extra: dev
""")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\\nmuster = stand_in:main\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return "stand_in-1-py3-none-any.whl"
'''

# The command `muster`: prints what it was given, and ends as a job file that is wrong does when told so.
COMMAND = """
import sys

def main():
    print(sys.argv[1:])
    return 64 if "fail" in sys.argv else 0
"""


def make_wheel(folder: Path, name: str, version: str, code: str = "") -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


class Project:
    """A folder with a space in its name, and a folder of wheels for pip: torch 1.5 with and without CUDA."""

    def __init__(self, parent: Path) -> None:
        self.root = parent / "a project"
        self.wheels = parent / "wheels"
        (self.root / ".ci").mkdir(parents=True)
        self.wheels.mkdir()
        shutil.copy(ROOT / ".ci" / "setup", self.root / ".ci")
        shutil.copy(ROOT / "Makefile", self.root)
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "backend.py").write_text(BACKEND)
        (self.root / "stand_in.py").write_text(COMMAND)
        self.pin("torch==1.5", "tool==1.0")
        self.cpu_torch = make_wheel(self.wheels, "torch", "1.5+cpu", "class version: cuda = hip = None")
        make_wheel(self.wheels, "torch", "1.5", "class version: cuda = '12.0'; hip = None")
        make_wheel(self.wheels, "tool", "1.0")

    def pin(self, *pins: str) -> None:
        (self.root / "constraints.txt").write_text("".join(f"{pin}\n" for pin in pins))

    @property
    def environ(self) -> dict[str, str]:
        """Ours, less whatever could change what set-up does."""
        kept = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "TMPDIR")}
        return {
            **kept,
            # The interpreter that runs the tests may be one without ensurepip's package: its base has it.
            "PATH": os.pathsep.join((os.path.dirname(os.path.realpath(sys.executable)), "/usr/bin", "/bin")),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
        }

    def start(self, *command: str, **environ: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*command, **environ)
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def set_up(self, *parts: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return self.run(".ci/setup", *parts, **environ)

    def torch_version(self) -> str:
        code = "from importlib.metadata import version; print(version('torch'))"
        return self.run(".venv/bin/python", "-c", code).stdout.strip()

    @property
    def packages(self) -> Path:
        return next(self.root.glob(".venv/lib/python3*/site-packages"))
