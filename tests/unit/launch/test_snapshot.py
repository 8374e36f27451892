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
        "runs/one/events.jsonl",
        "runs/one/job.yaml",
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


@pytest.mark.parametrize("has_git", [True, False])
def test_runs_do_not_contain_earlier_runs(source: Path, tmp_path: Path, has_git: bool) -> None:
    """Wherever they are: in a folder that nobody ignores, beside the code, as a sweep, and in the job's own runs."""
    if has_git:
        subprocess.run(["git", "init", "--quiet", source], check=True)
        (source / "data.bin").unlink()
    for name in ("my folder/run-1/job.yaml", "my folder/sweep-1/sweep.json", "results/half made/job.yaml"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("{}")
        (source / name).with_name("task.py").touch()
        if "results" not in name:
            (source / name).with_name("events.jsonl").touch()
    expected = ["job.yaml", "my folder/runs.py", "task.py"]
    assert copied(source, source / "results/run-2") == sorted([*expected, *[".hidden/a.py", "start.sh"] * has_git])


def test_a_new_runs_folder_ignores_itself(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    RunFolder.create(str(tmp_path / "runs"), "digits", "name: digits\n")
    status = ["git", "-C", str(tmp_path), "status", "--porcelain", "--untracked-files=all"]
    assert subprocess.run(status, capture_output=True, check=True).stdout == b""
    (tmp_path / "code").mkdir()
    RunFolder.create(str(tmp_path / "code"), "digits", "name: digits\n")  # the user's own folder stays as it is
    assert not (tmp_path / "code/.gitignore").exists()


def test_data_is_refused_by_its_largest_file(source: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", source], check=True)
    os.truncate(source / "data.bin", LIMIT_MB << 20)
    with pytest.raises(JobError, match=rf"is {LIMIT_MB} MiB, more than {LIMIT_MB}; .* data.bin.*\.gitignore"):
        take_snapshot(source, RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
