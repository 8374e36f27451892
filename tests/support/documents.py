"""What README.md and docs/*.md tell their readers to type, and a copy of the project to type it in.

A command is run as it stands on the page, made shorter by further words: fewer steps, on the CPU.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from muster_runs import environment
from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("tests/support/plain_digits.py", "jobs/digits_script.py")
"""The same training without a session and with one."""
SHORT = ("device=cpu", "train.steps=12")
TIERS = {
    "slurm": re.compile(r"(sbatch|srun|squeue|scancel) |make slurm-|muster (?!render)\S+ .*--on slurm"),
    "docker": re.compile(r"docker |make docker-|muster image|muster (?!render)\S+ .*--on docker"),
    "kubernetes": re.compile(r"kubectl |make k8s-|muster (?!render)\S+ .*--on kubernetes"),
}
"""Commands that need more than this machine, by the tier of tests that runs them."""


@dataclass(frozen=True)
class Block:
    """One block of commands, which are typed one after the other."""

    page: Path
    commands: tuple[str, ...]


def code(page: Path, language: str) -> list[str]:
    """The blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[Block]:
    """The blocks of commands of a page, without their comments."""
    found = [[re.sub(r"\s+# .*", "", line) for line in text.splitlines()] for text in code(page, "console")]
    return [Block(page, tuple(lines)) for lines in found]


def tier(command: str) -> str:
    """The tier that a command needs; `cli` for one that runs anywhere."""
    return next((name for name, pattern in TIERS.items() if pattern.match(command)), "cli")


def commands(name: str) -> list[str]:
    """Every command of a tier, once, in the order of the pages."""
    found = [command for page in PAGES for block in blocks(page) for command in block.commands]
    return list(dict.fromkeys(command for command in found if tier(command) == name))


def copy_project(folder: Path) -> Path:
    """Copy the project's files, committed or not, with a link to this environment as `.venv`."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
            (folder / name).chmod((ROOT / name).stat().st_mode)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def shortened(command: str, *more: str) -> str:
    """A command with further words: of the job, of `make`, or of what it installs."""
    words = shlex.split(command)
    if "JOB=jobs/bytelm.yaml" in words:  # it evaluates on all that is held out: of this folder, a small part
        more = (*more, "task_args.folder=trainer")
    if "jobs/digits-script.yaml" in words:  # which counts its own epochs
        more = (*more, "script_args=[--epochs=1]")
    if words[0] == "make":
        given = " ".join(word.removeprefix("ARGS=") for word in words if word.startswith("ARGS="))
        words = [word for word in words if not word.startswith("ARGS=")]
        own = ["tests/unit/project/test_docs.py"] if words[1] == "test" else [given, *more]
        # The environment is there, and is not made again.
        return shlex.join([*words, "--assume-old=setup", "--assume-old=setup-dev", f"ARGS={' '.join(own)}"])
    if re.match(r"\S*muster (run|submit) |sbatch ", command):
        return shlex.join([*words, *more])
    if command.startswith("muster compare"):
        few = "" if "--mode" in command else " --mode dp"  # all of them: tests/gloo/test_compare.py
        return f"{command} --steps 3 --rounds 1 device=cpu{few}"
    if command.startswith("pip install"):  # without a network, and not into this environment
        return f"{command} --no-deps --no-index --no-build-isolation --target installed"
    return command


def rendered(command: str) -> str | None:
    """What can be asked about a command of another tier without its tools, if anything."""
    if command.startswith("muster image"):
        return None
    if command.startswith("muster"):
        return re.sub(r" --sweep \S+", "", re.sub(r"^muster \w+", "muster render", command))
    return f"make --dry-run {command.removeprefix('make ')}" if command.startswith("make") else None


def variables(project: Path, **more: str) -> dict[str, str]:
    """The environment of a shell in which the project's environment is active."""
    found = environment(**more)
    del found["PYTHONPATH"]
    return {**found, "PATH": f"{project}/.venv/bin:{found['PATH']}"}
