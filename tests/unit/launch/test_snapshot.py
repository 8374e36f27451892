"""The code that goes with a run: what git knows and does not ignore, read-only, taken once, and no data."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from trainer.errors import JobError
from trainer.launch.snapshot import LIMIT_MB, take_snapshot
from trainer.run.folder import RunFolder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of code with what does not belong into a snapshot beside it."""
    files = (
        "task.py",
        "my folder/runs.py",
        "job.yaml",
        ".hidden/a.py",
        "runs/one/code/task.py",
        "start.sh",
        "data.bin",
    )
    for name in files:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "source/start.sh").chmod(0o755)
    return tmp_path / "source"


def copied(source: Path, run: Path) -> list[str]:
    (run / "plan").mkdir(parents=True)
    code = take_snapshot(source, RunFolder(run))
    return sorted(str(path.relative_to(code)) for path in code.rglob("*") if path.is_file())


def test_what_git_does_not_ignore(source: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", source], check=True)
    (source / ".gitignore").write_text("runs/\n*.bin\n")
    run = tmp_path / "run"
    assert copied(source, run) == [".gitignore", ".hidden/a.py", "job.yaml", "my folder/runs.py", "start.sh", "task.py"]
    modes = [(run / "code" / name).stat().st_mode & 0o777 for name in ("task.py", "start.sh")]
    assert modes == [0o444, 0o555]
    said = json.loads((run / "plan/code.json").read_text())
    assert (said["files"], len(said["sha256"])) == (6, 64)
    (source / "task.py").write_text("changed meanwhile")
    take_snapshot(source, RunFolder(run))
    assert (run / "code/task.py").read_text() == "task.py"


def test_without_git_python_and_yaml_files(source: Path, tmp_path: Path) -> None:
    assert copied(source, tmp_path / "run") == ["job.yaml", "my folder/runs.py", "task.py"]


def test_data_is_refused_by_its_largest_file(source: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", source], check=True)
    os.truncate(source / "data.bin", LIMIT_MB << 20)
    with pytest.raises(JobError, match=rf"is {LIMIT_MB} MiB, more than {LIMIT_MB}; .* data.bin.*\.gitignore"):
        take_snapshot(source, RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
