"""What a user may call a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.errors import JobError
from trainer.run.folder import RunFolder
from trainer.run.named import find_any, find_path, find_run


def make(path: Path, age: int = 0) -> RunFolder:
    path.mkdir(parents=True)
    run = RunFolder(path.resolve())
    run.job.write_text("name: x\n")
    run.events.mkdir()
    os.utime(run.job, (1000 - age, 1000 - age))
    return run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of digits, the second name the older; a run of another job, a sweep, and a job file."""
    monkeypatch.chdir(tmp_path)
    make(Path("runs/digits-1128-10-aaaa"), age=5)
    make(Path("runs/digits-1128-11-bbbb"), age=9)
    make(Path("runs/digits"), age=20)
    make(Path("other/cells-1128-12-cccc"), age=1)
    sweep = Path("runs/digits-sweep-1128-13-dddd")
    (sweep / "events").mkdir(parents=True)
    (sweep / "sweep.json").write_text('{"sweep": "train.lr=1,2", "runs": []}')
    Path("jobs").mkdir()
    Path("jobs/digits.yaml").write_text("name: digits\n")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("latest", "digits-1128-10-aaaa"),
        ("digits-1128-1", None),
        ("digits-1128-11", "digits-1128-11-bbbb"),
        ("digits", "digits"),
        ("runs/digits-1128-10", "digits-1128-10-aaaa"),
        ("runs/digits-1128-10-aaaa", "digits-1128-10-aaaa"),
        ("runs/digits-1128-10-aaaa/job.yaml", "digits-1128-10-aaaa"),
        ("other/latest", "cells-1128-12-cccc"),
        ("other/cells", "cells-1128-12-cccc"),
        ("cells", None),
        ("digits-*-11", None),
    ],
)
def test_a_run_is_found_by_path_name_and_age(runs: Path, given: str, name: str | None) -> None:
    if name is None:
        with pytest.raises(JobError, match=r"several runs start|is not a run folder"):
            find_run(given)
    else:
        assert find_run(given).name == name


def test_several_are_refused_with_their_names(runs: Path) -> None:
    with pytest.raises(
        JobError,
        match=r"'digits-1128': several runs start with it; they are digits-1128-11-bbbb, digits-1128-10-aaaa\. Give",
    ):
        find_run("digits-1128")
    for number in range(6):
        make(runs / f"many-{number}", age=-number)
    with pytest.raises(
        JobError, match="several runs start with it; the newest of 6 are many-1, many-2, many-3, many-4, many-5"
    ):
        find_run("man")
    with pytest.raises(JobError, match="Did you mean digits-1128-10-aaaa"):
        find_run("digits-1128-10-aaab")


@pytest.mark.parametrize("place", ["latest", "runs/latest"])
def test_what_is_called_latest_is_that(runs: Path, place: str) -> None:
    named = make(Path(place), age=99)
    assert find_run("latest") == named
    assert find_run("runs/digits").name == "digits", "a path that exists wins over runs that begin so"


def test_a_sweep_is_no_run(runs: Path) -> None:
    with pytest.raises(JobError, match=r"is a sweep\. `muster list digits-sweep-1128-13-dddd` shows its runs"):
        find_run("digits-sweep-1128-13-dddd")
    assert str(find_path("digits-s", sweeps=True)) == "runs/digits-sweep-1128-13-dddd"
    assert find_path("latest", sweeps=True) == find_path("digits-s", sweeps=True)
    assert find_path("jobs/digits.yaml") == Path("jobs/digits.yaml") and find_path("jobs/nothing.yaml") is None


def test_a_folder_or_file_that_is_no_run_hides_none(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the folder of a job's code, which is called as the job is."""
    make(runs / "cells-1128-14-eeee")
    Path("cells").mkdir()
    Path("digits-1128-10").touch()
    assert (find_run("cells").name, find_run("digits-1128-10").name) == ("cells-1128-14-eeee", "digits-1128-10-aaaa")
    assert find_path(".") == Path() and find_path("jobs") is None
    monkeypatch.chdir(runs / "digits")
    assert {find_run(given).path for given in (".", "job.yaml", "../digits")} == {runs / "digits"}


def test_a_name_that_fits_a_run_and_a_sweep_is_refused(runs: Path) -> None:
    make(runs / "digits-small-1128-14-eeee")
    with pytest.raises(JobError, match=r"the run digits-small-1128-14-eeee and the sweep digits-sweep-.* start with"):
        find_any("digits-s")
    assert [found.name for given in ("digits-sm", "digits-sw", "latest") if (found := find_any(given))] == [
        "digits-small-1128-14-eeee", "digits-sweep-1128-13-dddd", "digits-small-1128-14-eeee",
    ]  # fmt: skip
    assert find_any("nothing") is None
