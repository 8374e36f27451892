"""Nobody acts on a run folder that somebody else made or may write into: it would be done in their own name."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

from trainer.errors import WRONG_JOB, JobError
from trainer.launch import control
from trainer.launch.submit import run_job, submit_job
from trainer.records import write_json
from trainer.run import ownership
from trainer.run.folder import RunFolder
from trainer.run.ownership import check_owner, note_open_modes

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """One that has ended, with a handle and with code."""
    made = RunFolder.create(str(tmp_path / "runs"), "digits", (ROOT / "jobs/digits.yaml").read_text())
    write_json(made.handle, {"platform": "local", "pid": 1, "started": "0"})
    (made.code / "package").mkdir(parents=True)
    (made.code / "package/task.py").touch()
    made.attempts.mkdir()
    return made


def agent(run: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "muster.py", "agent", run], capture_output=True, text=True)
    assert done.returncode == WRONG_JOB and "Traceback" not in done.stderr
    raise JobError("RUN", run, done.stderr, "")


def supervisor(run: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "muster.py", "supervisor", run], capture_output=True, text=True)
    assert done.returncode == WRONG_JOB and "Traceback" not in done.stderr
    raise JobError("RUN", run, done.stderr, "")


@pytest.mark.parametrize(
    "act",
    [control.cancel, control.preempt, lambda run: submit_job(run, [], None, None),
     lambda run: run_job(run, [], None, None), agent, supervisor],
    ids=["cancel", "preempt", "submit", "run", "agent", "supervisor"],
)  # fmt: skip
def test_every_verb_that_acts_refuses_what_others_may_write(act: Callable[[str], None], run: RunFolder) -> None:
    before = sorted(path.stat().st_mtime_ns for path in run.path.rglob("*"))
    run.job.chmod(0o664)
    with pytest.raises(JobError, match=rf"others than you may write to {run.job}: .*chmod -R go-w {run}"):
        act(str(run))
    assert sorted(path.stat().st_mtime_ns for path in run.path.rglob("*")) == before  # nor is anything written there
    assert control.status(str(run))["state"] == "lost"  # who only looks is not refused


@pytest.mark.parametrize(
    "name", [".", "job.yaml", "plan", "plan/source.json", "attempts", "handle.json", "logs", "code/package/task.py"]
)
def test_what_is_acted_upon_is_ones_own(name: str, run: RunFolder) -> None:
    check_owner(run)
    path = run.path / name
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(JobError, match=rf"others than you may write to {path}"):
        check_owner(run)


def test_a_default_acl_of_the_folder_around_gives_nobody_rights(tmp_path: Path) -> None:
    """As folders that a group shares have: it beats the umask."""
    everybody = (1 << 32) - 1
    entries = ((1, 7, everybody), (4, 7, everybody), (8, 7, 1000), (16, 7, everybody), (32, 5, everybody))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:  # this file system has none, so nobody can get such rights
        return
    run = RunFolder.create(str(tmp_path), "digits", "name: digits\n")
    by_hand = RunFolder(tmp_path / "by hand")
    by_hand.make()
    by_hand.job.touch()
    for each in (run, by_hand):
        check_owner(each)


def test_a_file_system_of_fixed_modes_hides_nobody(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Windows' drives, CIFS and vfat, which few machines can mount for a test: a mode is never what was asked."""
    stat = os.stat

    def fixed(path: str | Path, **options: bool) -> os.stat_result:
        facts = stat(path, **options)
        return os.stat_result((facts.st_mode | 0o777, *facts[1:]), {"st_dev": facts.st_dev})

    def refuse(path: str, mode: int) -> None:
        raise PermissionError(path)

    note_open_modes(run)
    monkeypatch.setattr(Path, "stat", fixed)
    with pytest.raises(JobError, match="others than you may write"):  # the modes of new files are as asked for
        check_owner(run)
    monkeypatch.setattr(os, "stat", fixed)
    monkeypatch.setattr(os, "chmod", refuse)
    check_owner(run)
    assert capsys.readouterr().err == ""
    note_open_modes(run)
    assert capsys.readouterr().err.count(f"the file system of {run} lets others write to all files") == 1
    assert not list(run.path.glob(".probe*"))


def test_the_remedy_reaches_all_that_is_acted_upon(run: RunFolder) -> None:
    """The code of a sweep, which lies beside its runs and where no option of chmod follows a link."""
    sweep = run.path.with_name("a sweep")
    sweep.mkdir()
    run.code.rename(sweep / "code")
    run.code.symlink_to("../a sweep/code")
    check_owner(run)
    for path in (sweep, sweep / "code", sweep / "code/package/task.py"):
        path.chmod(path.stat().st_mode | 0o022)
        with pytest.raises(JobError, match=f"others than you may write to .*{path.name}") as refused:
            check_owner(run)
        subprocess.run(["sh", "-c", refused.value.remedy.partition(": ")[2]], check=True)
        check_owner(run)


def test_the_remedy_names_an_acl_that_new_files_would_get(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.attempts.chmod(0o775)
    monkeypatch.setattr(os, "listxattr", lambda path: ["system.posix_acl_default"] * (path == run.attempts))
    with pytest.raises(JobError, match=f"setfacl -R -b {run} && chmod -R go-w {run}$"):
        check_owner(run)


def test_what_ranks_make_may_be_open_to_a_group(run: RunFolder) -> None:
    """A script may set its own umask, and its run goes on all the same."""
    run.tensorboard.mkdir()
    run.tensorboard.chmod(0o775)
    check_owner(run)


def test_what_a_person_puts_there_is_left_alone(run: RunFolder) -> None:
    (run.path / "notes.txt").touch()
    (run.path / "notes.txt").chmod(0o666)
    (run.code / "data").symlink_to("/tmp")  # nor is what a link of the user's code leads to
    check_owner(run)


@needs_root
@pytest.mark.parametrize("name", [".", "job.yaml", "code/package"])
def test_root_does_not_act_on_what_is_a_users(name: str, run: RunFolder) -> None:
    os.chown(run.path / name, 1, -1)
    with pytest.raises(JobError, match=r"belongs to daemon, and you are root: nothing .* Act as daemon, or submit"):
        control.cancel(str(run))


@needs_root
def test_in_a_container_the_options_of_its_start_are_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(run.job, 1, -1)
    monkeypatch.setattr(ownership, "MARKS_OF_CONTAINERS", ["/"])
    with pytest.raises(JobError, match=r"belongs to daemon.* --user \$\(id -u\), or.* --env=MUSTER_PLATFORM=docker"):
        check_owner(run)


def test_a_job_of_a_cluster_that_is_not_asked_for_has_an_unknown_state(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    handle = {"platform": "kubernetes", "kind": "jobs.batch", "name": "b-1", "namespace": "x", "run": str(run)}
    write_json(run.handle, handle)
    run.handle.chmod(0o664)
    found = control.status(str(run))
    assert found["state"] == "unknown" and f"others than you may write to {run.handle}" in found["reason"]
    control.logs(str(run), None, False)
    assert f"others than you may write to {run.handle}" in capsys.readouterr().err
    run.record("done")
    assert control.status(str(run))["state"] == "done"


@needs_root
def test_a_file_system_that_makes_everybody_the_same_user_is_no_stranger(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an NFS export with all_squash."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    check_owner(run)
