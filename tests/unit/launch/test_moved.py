"""Runs whose folder was moved, renamed or copied: whose code is theirs, and what the platform's handle means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trainer.errors import JobError
from trainer.launch import control
from trainer.launch.moved import copied_from, find_code
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run of a project, with its job file in a folder of it."""
    (tmp_path / "one/jobs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one")
    made = RunFolder.create("runs", "digits", "name: digits\n", tmp_path / "one/jobs")
    write_json(made.handle, {"platform": "local", "pid": 1, "started": "0", "run": str(made)})
    return made


def places(run: RunFolder) -> tuple[str, str]:
    source = read_json(run.source) or {}
    return source["working_directory"], source["job_folder"]


def test_at_its_place_nothing_is_said(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = run.source.read_text()
    find_code(run)
    assert run.source.read_text() == before and capsys.readouterr().err == ""


@pytest.mark.parametrize("copied", [True, False])
def test_with_its_project_it_takes_the_code_there(
    run: RunFolder, copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "two"
    (shutil.copytree if copied else shutil.move)(tmp_path / "one", there)
    moved = RunFolder(there / "runs" / run.name)
    monkeypatch.chdir(there)
    find_code(moved)
    assert places(moved) == (str(there), str(there / "jobs"))
    assert capsys.readouterr().err == f"note: this run was made in {run}; it now uses the code in {there}\n"
    find_code(moved)
    assert capsys.readouterr().err == ""


def test_with_a_snapshot_it_has_its_code_along(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.code.mkdir()
    moved, before = RunFolder(run.path.rename(tmp_path / "mine")), places(RunFolder(tmp_path / "mine"))
    shutil.rmtree(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    find_code(moved)
    assert places(moved) == before and capsys.readouterr().err == ""


def test_asked_from_elsewhere_it_keeps_the_code_of_a_project_that_is_there(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that merely looks like the project, such as a backup of the runs, does not take its place."""
    moved = RunFolder(Path(shutil.copytree(run, tmp_path / "backup/runs" / run.name)))
    monkeypatch.chdir(tmp_path)
    find_code(moved)
    assert places(moved) == (str(tmp_path / "one"), str(tmp_path / "one/jobs"))


@pytest.mark.parametrize("place", ["archive/best run", "one/runs/best"])
def test_alone_it_keeps_its_code(
    run: RunFolder, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    moved = RunFolder(run.path.rename(tmp_path / place))
    monkeypatch.chdir(tmp_path)
    find_code(moved)
    assert places(moved) == (str(tmp_path / "one"), str(tmp_path / "one/jobs"))
    assert f"was made in {run}; it now uses the code in {tmp_path / 'one'}" in capsys.readouterr().err


def test_without_its_project_it_takes_the_working_directory(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a copy of the run alone to another machine; also of versions that did not keep the run's own place."""
    source = read_json(run.source) or {}
    write_json(run.source, {name: value for name, value in source.items() if name != "run"})
    moved = RunFolder(run.path.rename(tmp_path / "mine"))
    shutil.rmtree(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    find_code(moved)
    assert places(moved) == (str(tmp_path), str(tmp_path))
    assert f"it now uses the code in {tmp_path}" in capsys.readouterr().err


def test_the_handle_of_a_copy_is_that_of_its_original(run: RunFolder, tmp_path: Path) -> None:
    """A copy neither runs with its original, nor ends it."""
    copy = RunFolder(shutil.copytree(run, tmp_path / "copy"))
    handle = json.loads(run.handle.read_text())
    assert copied_from(run, handle) is None and copied_from(copy, handle) == run
    found = control.status(str(copy))
    assert (found["state"], str(run) in found["reason"]) == ("lost", True)
    for verb in (control.cancel, control.preempt):
        with pytest.raises(JobError, match=f"is a copy of {run}"):
            verb(str(copy))
    copy.record("done", attempt=0, step=9)
    assert control.status(str(copy))["state"] == "done"
    shutil.rmtree(run)
    assert copied_from(copy, handle) is None, "it was moved"
    (tmp_path / "link").symlink_to(copy)
    assert copied_from(RunFolder(tmp_path / "link"), handle | {"run": str(copy)}) is None, "it is the same"


def test_a_run_of_another_machine_is_not_lost_while_its_lock_is_held(run: RunFolder) -> None:
    handle = {"platform": "local", "pid": 1, "started": "0", "run": str(run), "host": "another"}
    write_json(run.handle, handle)
    from trainer.launch.local.platform import lock

    assert control.status(str(run))["state"] == "unknown", "there is no lock that would tell"
    with lock(run):
        found = control.status(str(run))
        assert (found["state"], "its supervisor is on another" in found["reason"]) == ("running", True)
        with pytest.raises(JobError, match=r"is not running here: it is running.*on another"):
            control.cancel(str(run))
    assert control.status(str(run))["state"] == "lost"
    write_json(run.exit, {"code": 0})
    assert control.status(str(run))["state"] == "done"
