"""The code that goes with a run: what git knows and does not ignore, read-only, taken once, and no data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from trainer.errors import JobError
from trainer.launch.snapshot import LIMIT_MB, take_snapshot
from trainer.launch.source_files import LARGE, MANY
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


def test_without_git_what_does_not_look_like_data(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is left out is said."""
    for name in (
        "labels.json",
        "LICENSE",
        "weights.PTH",
        "kernels/fast.cu",
        "venv/pyvenv.cfg",
        "venv/lib/a.py",
        "__pycache__/a.py",
    ):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).touch()
    (source / "images").mkdir()
    for index in range(MANY + 1):
        (source / f"images/{index:06d}.txt").touch()
    expected = ["LICENSE", "job.yaml", "kernels/fast.cu", "labels.json", "my folder/runs.py", "start.sh", "task.py"]
    assert copied(source, tmp_path / "run") == expected
    said = f"{MANY + 3} files, such as data.bin, are not copied for the nodes: {source} is not in git"
    assert said in capsys.readouterr().err
    assert said in json.loads((tmp_path / "run/plan/code.json").read_text())["left_out"][0]


def git(*words: object) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *identity, *map(str, words)], check=True, capture_output=True)


def test_submodules_nested_clones_and_links(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library, elsewhere = tmp_path / "library", tmp_path / "elsewhere"
    for folder in (library, elsewhere, source / "package", source / "nested"):
        folder.mkdir()
        (folder / "module.py").write_text(folder.name)
    for folder in (library, source, source / "nested"):
        git("init", "--quiet", folder)
    git("-C", library, "add", ".")
    git("-C", library, "commit", "-qm", "1")
    git("-C", source, "submodule", "add", "-q", library, "third party/lib")
    (source / "data.bin").unlink()
    (source / "linked").symlink_to("package")
    (source / "same.py").symlink_to("package/module.py")
    (source / "alias.py").symlink_to(elsewhere / "module.py")
    (source / "outside").symlink_to(elsewhere)
    (source / "loop").symlink_to(source)
    run = tmp_path / "run"
    names = copied(source, run)
    assert {"third party/lib/module.py", "package/module.py", "nested/module.py", "same.py"} <= set(names)
    code = run / "code"
    assert (code / "linked").resolve() == code / "package" and not os.path.isabs(os.readlink(code / "linked"))
    assert os.readlink(code / "same.py") == "package/module.py"
    for name, target in (("alias.py", elsewhere / "module.py"), ("outside", elsewhere)):  # nothing is copied from there
        assert (code / name).is_symlink() and Path(os.readlink(code / name)) == target
    assert (code / "loop").resolve() == code
    notes = capsys.readouterr().err.splitlines()
    assert [note.partition(", which is not copied")[0] for note in notes] == [
        f"note: alias.py is a link to {elsewhere}/module.py", f"note: outside is a link to {elsewhere}",
    ]  # fmt: skip


def test_a_copy_is_for_this_user_alone_and_allows_no_more_than_its_source(source: Path, tmp_path: Path) -> None:
    git("init", "--quiet", source)
    modes = {"task.py": 0o600, "job.yaml": 0o664, "start.sh": 0o4750}
    for name, mode in modes.items():
        (source / name).chmod(mode)
    run = tmp_path / "run"
    copied(source, run)
    assert {name: (run / "code" / name).stat().st_mode & 0o7777 for name in modes} == {
        "task.py": 0o400, "job.yaml": 0o444, "start.sh": 0o550,
    }  # fmt: skip
    assert (run / "code").stat().st_mode & 0o777 == 0o700


SECRETS = (".env", ".env.local", "a/server.pem", "tls.KEY", "id_rsa", "id_ed25519.old", ".netrc", ".aws/config",
           "a/.ssh/x", "credentials.json", "credentials-prod", "store.p12", "secrets.yaml")  # fmt: skip
NO_SECRETS = (".env.example", "credentials.py", "a/keys.py", "environment.yml", "secrets.py", "identity.txt")


@pytest.mark.parametrize("kind", ["untracked", "tracked", "no git"])
def test_secrets_stay_behind_by_name(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*SECRETS, *NO_SECRETS):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).touch()
    (source / "linked.txt").symlink_to(".env")
    if kind != "no git":
        git("init", "--quiet", source)
    if kind == "tracked":
        git("-C", source, "add", "--force", ".")
    names = set(copied(source, tmp_path / "run"))
    hidden = {name for name in (*SECRETS, *NO_SECRETS) if name[0] == "." or "/." in name}
    assert not names & set(SECRETS)
    assert set(NO_SECRETS) - (hidden if kind == "no git" else set()) <= names
    assert os.readlink(tmp_path / "run/code/linked.txt") == str(source / ".env"), "a link copies nothing"
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "by its name it is a secret" in line]
    assert "absolute path" in said and ("credentials.json" in said or ".env" in said)


def test_what_git_refuses_is_not_guessed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin/git"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'fatal: detected dubious ownership in repository' >&2; exit 128\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with pytest.raises(JobError, match=r"code='.*': git does not list .*dubious ownership.*safe\.directory"):
        take_snapshot(source, RunFolder(tmp_path / "run"))


def test_half_a_copy_is_none(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a file cannot be read, nor where the copying was killed: a run that is continued tries again."""
    run, copy = tmp_path / "run", shutil.copyfile

    def fail(origin: Path, target: Path) -> None:
        if origin.name == "task.py":
            raise PermissionError(13, "Permission denied")
        copy(origin, target)

    with monkeypatch.context() as patch, pytest.raises(JobError, match=r"task\.py.*cannot be copied"):
        patch.setattr(shutil, "copyfile", fail)
        copied(source, run)
    assert [path.name for path in run.iterdir()] == ["plan"]
    (run / ".code").mkdir()
    (run / ".code/half.py").touch()
    code = take_snapshot(source, RunFolder(run))
    assert (code / "task.py").exists() and not (code / "half.py").exists()
    assert sorted(path.name for path in run.iterdir()) == ["code", "plan"]


def test_a_hook_of_git_may_submit(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git("init", "--quiet", source)
    (source / ".gitignore").write_text("*.bin\n")
    git("-C", source, "add", "--force", "data.bin")  # which only the index of this repository knows
    git("init", "--quiet", tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    assert {"task.py", "data.bin"} <= set(copied(source, tmp_path / "run"))


@pytest.mark.parametrize("has_git", [True, False])
def test_without_a_repository_links_are_kept_and_large_files_are_not(
    source: Path, tmp_path: Path, has_git: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where git is not installed."""
    if not has_git:
        monkeypatch.setenv("PATH", str(tmp_path))
    (source / "package").mkdir()
    (source / "package/module.py").touch()
    (source / "linked").symlink_to("package")
    with (source / "records.txt").open("wb") as file:
        file.truncate(LARGE + 1)
    names = copied(source, tmp_path / "run")
    assert "task.py" in names and "records.txt" not in names
    assert (tmp_path / "run/code/linked/module.py").is_file()


def test_a_task_of_a_sweep_that_was_moved_away_from_it(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/code").symlink_to("../digits-sweep/code")
    with pytest.raises(JobError, match=r"its code is that of its sweep, .*Keep the folder of the sweep"):
        take_snapshot(source, RunFolder(tmp_path / "run"))


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
    expected = ["job.yaml", "my folder/runs.py", "start.sh", "task.py"]
    assert copied(source, source / "results/run-2") == sorted([*expected, *[".hidden/a.py"] * has_git])


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
