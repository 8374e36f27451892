"""What .ci/setup does, as its user sees it: on machines that lack something, again, after an interruption."""

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_project import HAS_GPU, ROOT, Project
from stopwatch import Stopwatch

TOOLS = [
    "bash",
    "basename",
    "cat",
    "cut",
    "dirname",
    "flock",
    "grep",
    "ls",
    "mkdir",
    "rm",
    "sed",
    "sha256sum",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that was set up once: making an environment is what takes the time."""
    project = Project(tmp_path_factory.mktemp("setup"))
    done = project.set_up()
    assert done.returncode == 0, done.stderr
    assert f"torch 1.5 for {'CUDA' if HAS_GPU else 'CPU'}" in done.stderr
    assert done.stdout == ""
    assert project.torch_version() == ("1.5" if HAS_GPU else "1.5+cpu")
    return project


@pytest.fixture
def project(made: Project) -> Iterator[Project]:
    """Ready at the start of each test, and made ready again after it."""
    yield made
    made.pin("torch==1.5", "tool==1.0")
    assert made.set_up().returncode == 0


def test_a_second_run_is_silent_and_instant(project: Project, stopwatch: Stopwatch) -> None:
    with stopwatch.at_most(2):
        done = project.set_up()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_extras_come_when_asked_for_and_only_then(project: Project) -> None:
    assert not (project.packages / "tool").exists()
    assert project.set_up("dev").returncode == 0
    assert (project.packages / "tool").exists()
    assert project.set_up("test").returncode == 64


def test_a_changed_pin_is_installed_and_a_failed_download_leaves_nothing_that_looks_ready(
    project: Project,
) -> None:
    project.pin("torch==1.5", "tool==2.0")
    for _ in range(2):
        failed = project.set_up("dev")
        assert failed.returncode == 1
        assert "not finished" in failed.stderr
    project.pin("torch==1.5", "tool==1.0")
    assert project.set_up("dev").returncode == 0


def test_an_interrupted_install_is_completed(project: Project) -> None:
    """As SIGKILL leaves it between a package's files and pip's last: pip takes it for installed."""
    for stamp in project.root.glob(".venv/.muster-*"):
        stamp.unlink()
    (project.packages / "torch" / "__init__.py").unlink()
    next(project.packages.glob("torch-*.dist-info/INSTALLER")).unlink()
    (project.packages / "~orch").mkdir()
    assert project.set_up().returncode == 0
    assert (project.packages / "torch" / "__init__.py").exists()
    assert not (project.packages / "~orch").exists()


def test_set_ups_at_the_same_time_wait_for_each_other(project: Project) -> None:
    project.pin("torch==1.5", "tool==1.0", "# changed")
    both = [project.start(".ci/setup") for _ in range(2)]
    says = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("ready" in said for said in says) == 1
    assert sum("waiting" in said for said in says) == 1


def test_a_gpu_build_stays_where_no_gpu_is_and_changes_on_request(project: Project) -> None:
    assert project.set_up(TORCH_BUILD="cuda").returncode == 0
    assert project.torch_version() == "1.5"
    project.pin("torch==1.5", "tool==1.0", "# changed")
    assert project.set_up().returncode == 0
    assert project.torch_version() == "1.5"


def test_without_a_cpu_build_cuda_is_announced_or_refused(project: Project) -> None:
    away = project.cpu_torch.rename(project.root / project.cpu_torch.name)
    for left in [*project.packages.glob("torch*"), *project.root.glob(".venv/.muster-*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    refused = project.set_up(TORCH_BUILD="cpu")
    assert refused.returncode == 64
    assert "TORCH_INDEX_URL" in refused.stderr.splitlines()[-1]
    assert not list(project.root.glob(".venv/.muster-*"))
    done = project.set_up()
    assert done.returncode == 0
    assert re.search(r"several\s+(set-up: )?GB", done.stderr)
    assert project.torch_version() == "1.5"
    away.rename(project.cpu_torch)


def test_a_job_file_with_spaces_and_the_exit_code_pass_through_make(project: Project) -> None:
    done = project.run("make", "train", "JOB=my jobs/it's.yaml", "ARGS=a=1 'b=2 3'")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['run', \"my jobs/it's.yaml\", 'a=1', 'b=2 3']\n"
    failed = project.run("make", "train", "ARGS=fail")
    assert failed.returncode == 2
    assert "Error 64" in failed.stderr


def test_a_folder_of_ours_is_never_emptied(project: Project) -> None:
    mine = project.root / "mine" / "thesis.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("years")
    done = project.set_up(MUSTER_VENV="mine")
    assert done.returncode == 64
    assert mine.read_text() == "years"


def test_a_moved_checkout_does_not_look_ready(project: Project) -> None:
    """Every script in bin/ names the old place. Without a Python to make it anew, nothing else happens."""
    home = project.root
    project.root = home.rename(home.with_name("moved"))
    done = project.set_up(PYTHON="no-such-python")
    project.root = project.root.rename(home)
    assert done.returncode == 64
    assert "PYTHON=no-such-python" in done.stderr


@pytest.fixture
def bare() -> Iterator[Path]:
    """A machine with nothing but set-up's own tools, in bin/, and a project that any user may read."""
    with tempfile.TemporaryDirectory(prefix="setup-") as folder:
        root = Path(folder)
        root.chmod(0o777)
        (root / ".ci").mkdir()
        (root / "bin").mkdir()
        shutil.copy(ROOT / ".ci" / "setup", root / ".ci")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, root)
        for tool in TOOLS:
            (root / "bin" / tool).symlink_to(shutil.which(tool) or "")
        yield root


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def set_up_bare(root: Path, as_root: bool = False) -> "subprocess.CompletedProcess[str]":
    nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 and not as_root else {}
    command = [str(root / ".ci" / "setup")]
    return subprocess.run(command, env={"PATH": f"{root}/bin"}, capture_output=True, text=True, **nobody)  # type: ignore[call-overload]


def test_an_old_python_is_refused_in_one_line(bare: Path) -> None:
    write_program(bare / "bin" / "python3", 'case "$2" in *print*) echo 3.8 ;; *) exit 1 ;; esac')
    done = set_up_bare(bare)
    assert done.returncode == 64
    assert len(done.stderr.splitlines()) == 1
    assert "3.8" in done.stderr
    assert "3.10" in done.stderr


def test_no_python_is_refused_in_one_line(bare: Path) -> None:
    done = set_up_bare(bare)
    assert done.returncode == 64
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("as_root", [False, True] if os.geteuid() == 0 else [False])
def test_without_ensurepip_root_gets_it_and_a_user_the_command(bare: Path, as_root: bool) -> None:
    """A distribution's Python as it comes. What apt-get really installs is the distribution's affair."""
    write_program(bare / "bin" / "python3", 'case "$2" in *ensurepip*) exit 1 ;; *print*) echo 3.11 ;; esac')
    write_program(bare / "bin" / "apt-get", 'echo "apt-get $*"')
    done = set_up_bare(bare, as_root)
    assert done.returncode == 64
    assert not (bare / ".venv").exists()
    if as_root:
        assert "apt-get install -qq --yes --no-install-recommends python3.11-venv" in done.stderr
    else:
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.endswith("sudo apt-get install python3.11-venv\n")
