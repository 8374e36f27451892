"""Committing a checkpoint: whole or not at all, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commits import commit_until_killed, payload, value_of
from foreign import missing, put_foreign
from ranks import start

from trainer.checkpoint import files as checkpoint
from trainer.checkpoint.files import PAYLOAD, newest_good, prune, sweep
from trainer.run.attempts import StaleAttempt, claim
from trainer.run.folder import RunFolder, committed, step_of

OLD, NEW = 1.0, 2.0


@pytest.mark.parametrize("steps, again, keep_last, best", [
    ([1, 2, 3], 4, 2, "step-000000001"),  # prunes step 2
    ([3], 3, 1, None),                    # replaces the only one there is: a resume from just before a stop does
    ([2, 3], 3, 2, None),
])  # fmt: skip
def test_sigkill_at_any_file_operation_leaves_the_previous_or_the_new_one(
    tmp_path: Path, steps: list[int], again: int, keep_last: int, best: str | None
) -> None:
    for step in steps:
        checkpoint.commit(tmp_path / "before", step, payload(OLD), {}, 0)
    seen = []
    for count in range(1, 1000):
        root = tmp_path / f"{count}"
        shutil.copytree(tmp_path / "before", root)
        process = start(commit_until_killed, root, again, NEW, keep_last, best, count)
        process.join()
        sweep(root)
        saved, refused = newest_good(root)
        assert saved is not None and not refused
        seen.append(value_of(saved))
        assert (step_of(saved), seen[-1]) in ((steps[-1], OLD), (again, NEW))
        assert len(list(committed(root))) >= min(len(steps), keep_last)
        checkpoint.commit(root, again + 1, payload(NEW), {}, 0)  # and the next save finds nothing in its way
        prune(root, 1, best)
        assert {path.name for path in root.iterdir()} == {f"step-{again + 1:09d}", *([best] if best else [])}
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert count > 20
    assert seen == sorted(seen), "once the new one was there, it stayed"
    assert {OLD, NEW} == set(seen)


def test_a_full_disk_leaves_the_previous_one_and_says_so(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("128k")
    root = disk / "checkpoints"
    checkpoint.commit(root, 1, payload(OLD), {}, 0)
    ballast, outcomes = disk / "ballast", []
    for filled in range(0, 2**17, 2**12):  # so that the disk becomes full at every stage of a save
        try:
            ballast.write_bytes(b"x" * filled)
        except OSError:
            break
        try:
            checkpoint.commit(root, 2, payload(NEW), {}, 0)
        except OSError as error:
            outcomes.append("full")
            assert "No space left on device" in str(error)
            saved, refused = newest_good(root)
            assert saved is not None and value_of(saved) == OLD and not refused
            assert [path.name for path in root.iterdir()] == ["step-000000001"], "what was half written is in the way"
        else:
            outcomes.append("saved")
            shutil.rmtree(root / "step-000000002")
    assert sorted(set(outcomes)) == ["full", "saved"] and outcomes.count("full") > 2


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint.commit(tmp_path, step, payload(OLD), {}, 0)
    prune(tmp_path, 2, "step-000000003")
    assert [step_of(folder) for folder in committed(tmp_path)] == [7, 6, 3]


def test_prune_leaves_what_a_person_put_there(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in range(1, 4):
        checkpoint.commit(root, step, payload(OLD), {}, 0)
    foreign = put_foreign(tmp_path)
    for _ in range(2):
        prune(root, 1, None)
        sweep(root)
    assert not missing(foreign)
    assert [step_of(folder) for folder in committed(root)] == [3, 0], "and the link"
    saved, refused = newest_good(root)
    assert saved is not None and step_of(saved) == 3 and not refused
    assert RunFolder(tmp_path).steps_committed() == 3 and RunFolder(tmp_path).state_bytes() > 0
    for step in (0, 999999998, 999999999):  # whose names we need now
        target = checkpoint.commit(root, step, payload(NEW), {}, 0)
        assert value_of(target) == NEW and not target.is_symlink()
    assert len(list(root.glob("other-step-*"))) == 3 and (root / "best of all").is_dir()


def test_a_stale_attempt_commits_nothing(tmp_path: Path) -> None:
    claim(RunFolder(tmp_path), 4)
    root = tmp_path / "checkpoints"
    checkpoint.commit(root, 1, payload(OLD), {}, 4)
    claim(RunFolder(tmp_path), 5)
    with pytest.raises(StaleAttempt, match=r"attempt 4 .* replaced by attempt 5"):
        checkpoint.commit(root, 2, payload(NEW), {}, 4)
    assert [path.name for path in root.iterdir()] == ["step-000000001"]


def test_all_is_on_the_disk_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure leaves a checkpoint that has its name and not its contents, or the reverse."""
    done: list[tuple[str, str]] = []
    fsync = os.fsync

    def record_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        size = path.stat().st_size if path.is_file() else 0
        done.append(("fsync", path.name if path.is_dir() else f"{path.name} {size}"))
        fsync(handle)

    def record_rename(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[0]).startswith(str(tmp_path)):
            done.append(("rename", f"{Path(arguments[0]).name} {Path(arguments[1]).name}"))

    monkeypatch.setattr(os, "fsync", record_fsync)
    sys.addaudithook(record_rename)
    root = tmp_path / "checkpoints"
    saved = checkpoint.commit(root, 7, payload(NEW), {}, 0)
    pending = f".pending-step-000000007-{os.getpid()}"
    whole = {name: f"{name} {(saved / name).stat().st_size}" for name in (*PAYLOAD, "manifest.json")}
    assert done == [
        *(("fsync", whole[name]) for name in (*PAYLOAD, "manifest.json")),
        ("fsync", pending), ("rename", f"{pending} step-000000007"), ("fsync", "checkpoints"),
    ]  # fmt: skip
