"""What a file system must be able to do is asked when a run folder is made, and on each node."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import JobError
from trainer.run.abilities import check_abilities
from trainer.run.folder import RunFolder


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Folders cannot be renamed, as on mounts of object stores."""
    real = os.rename

    def rename(source: Any, *rest: Any, **options: Any) -> None:
        if os.path.isdir(source):
            raise OSError(code, os.strerror(code))
        real(source, *rest, **options)

    monkeypatch.setattr(os, "rename", rename)


def test_a_usual_folder_is_able_and_stays_empty(tmp_path: Path) -> None:
    check_abilities(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV])
def test_a_mount_that_renames_no_folders_is_refused_before_the_run_folder_is_made(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, code)
    with pytest.raises(JobError, match=r"runs='.*': one cannot rename a folder there: .*runs=\.\.\."):
        RunFolder.create(str(tmp_path / "runs"), "digits", "name: digits\n")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".gitignore"]


def test_a_full_disk_is_no_inability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        check_abilities(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_nobody_can_make_one() -> None:
    with pytest.raises(JobError, match=r"runs='/sys': one cannot make a folder there: .*runs=\.\.\."):
        check_abilities(Path("/sys"))
