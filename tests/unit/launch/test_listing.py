"""`muster list`: runs side by side, and the results of a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import JobError
from trainer.launch import control
from trainer.launch.listing import list_runs, read_job
from trainer.launch.platform import JobStatus, Phase
from trainer.run.folder import RunFolder

LONG = "a-job-with-a-name-that-is-longer-than-most-1128-142310-abcd"


def make(root: Path, name: str, job: str, **metrics: float) -> RunFolder:
    """A run that is done, if it has metrics."""
    run = RunFolder(root / name)
    run.logs.mkdir(parents=True)
    run.job.write_text(job)
    run.handle.write_text(json.dumps({"platform": "local", "pid": 1, "started": "0"}))
    run.record("submitted")
    if metrics:
        run.record("training", step=0, steps=360)
        run.record("checkpoint", step=360)
        run.exit.write_text('{"code": 0}')
        run.evaluation.write_text(json.dumps({"step": 360, "attempt": 0, **metrics}))
    return run


def job(name: str = "cells", lr: float = 0.1, best: str = "null", more: str = "") -> str:
    mode = "max" if best == "accuracy" else "min"
    return f"name: {name}\ntrain:\n  lr: {lr}\n  epochs: 4\ncheckpoint: {{best: {best}, best_mode: {mode}}}\n{more}"


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `muster list` prints in a terminal of so many columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)

    def lines(*words: str, columns: int = 80) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        return list_runs(*(words or ("runs",)), as_json=False).splitlines()

    return lines


def test_a_table_that_fits(terminal: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    make(root, "cells-1", job(), loss=0.5, accuracy=0.9)
    make(root, "cells-2", job(lr=0.01, more="task_args: {width: 7}\nnew: 1\n"), loss=0.25, accuracy=0.95)
    make(root, "other-1", job("other", best="loss"), loss=0.125, accuracy=0.5)
    make(root, LONG, job("long"))
    head, *rows = terminal(columns=120)
    assert head.split() == ["run", "state", "age", "step", "metric", "differs", "in"]
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows]
    assert [row[0] for row in cells] == ["cells-1", "cells-2", "other-1", LONG], "the newest last, without their folder"
    assert [row[1] for row in cells] == ["done", "done", "done", "lost"] and cells[0][2].endswith(" s")
    assert cells[0][3:] == ["360/360", "accuracy 0.9000", "lr=0.1", "width=null"]
    assert cells[1][3:] == ["360/360", "accuracy 0.9500", "lr=0.01", "width=7"]
    assert cells[2][3:] == ["360/360", "loss 0.1250"], "the only one of its job differs from none"
    for columns in (40, 60, 80):
        lines = terminal(columns=columns)
        assert len(lines) == 5 and max(map(len, lines)) <= columns
        assert lines[-1].startswith("a-job-") and "0-abcd" in lines[-1], "what makes it unique stays"


def test_one_metric_for_all_is_a_column(terminal: Any, tmp_path: Path) -> None:
    for number in (1, 2):
        make(tmp_path / "elsewhere", f"cells-{number}", job(), loss=0.5, accuracy=number / 10)
    lines = terminal("elsewhere")
    assert "accuracy" in lines[0] and lines[1].split()[-1] == "0.1000"
    assert lines[1].startswith("elsewhere/cells-1 "), "as it can be given to other commands"


def test_machines_get_what_they_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make(tmp_path / "runs", "cells-1", job(), loss=0.5)
    assert list_runs("runs", False) == f"done       local      step 360/360      {run}"
    assert json.loads(list_runs("runs", True)) == control.list_all(tmp_path / "runs")
    assert json.loads(list_runs("runs", True))[0]["metrics"] == {"loss": 0.5}
    run.evaluation.write_text('{"step": 360, "attempt": 0, "loss": NaN, "worst": -Infinity, "accuracy": 0.5}')
    found = json.loads(list_runs("runs", True), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found[0]["metrics"] == {"loss": None, "worst": None, "accuracy": 0.5}


def sweep(root: Path, **fields: Any) -> Path:
    folder = root / "cells-sweep-1"
    (folder / "events").mkdir(parents=True)
    runs = [f"/elsewhere/cells-{number}" for number in (1, 2, 3)]  # the folder was moved
    (folder / "sweep.json").write_text(json.dumps({"sweep": "train.lr=0.1,0.01,1", "runs": runs, **fields}))
    return folder


@pytest.mark.parametrize(("best", "marked"), [("null", "0.01"), ("accuracy", "0.1")])
def test_a_sweep_shows_values_and_the_best(terminal: Any, tmp_path: Path, best: str, marked: str) -> None:
    root = tmp_path / "runs"
    make(root, "cells-1", job(lr=0.1, best=best), loss=0.5, accuracy=0.95)
    make(root, "cells-2", job(lr=0.01, best=best), loss=0.25, accuracy=0.9)
    make(root, "cells-3", job(lr=1, best=best))
    folder = sweep(root, key="train.lr", values=["0.1", "0.01", "1"])
    lines = terminal("cells-sweep")
    first, second = ("accuracy", "loss") if best == "accuracy" else ("loss", "accuracy")
    assert lines[0].split() == ["train.lr", "state", "step", first, second, "run"]
    assert [line.split()[0] for line in lines[1:4]] == ["0.1", "0.01", "1"]
    assert [line.split()[0] for line in lines[1:4] if " best " in line] == [marked]
    assert lines[3].split() == ["1", "lost", "-", "-", "-", "cells-3"]
    assert lines[4] == f"best by {first}: the {'largest' if best == 'accuracy' else 'smallest'}"
    found = json.loads(list_runs(str(folder), True))
    assert [run["value"] for run in found["runs"] if run["best"]] == [marked] and found["key"] == "train.lr"


def test_an_old_sweep_has_its_values_in_one_text(terminal: Any, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        make(tmp_path / "runs", f"cells-{number}", job())
    sweep(tmp_path / "runs")
    lines = terminal("cells-sweep-1")
    assert [line.split()[:2] for line in lines[1:]] == [["0.1", "lost"], ["0.01", "lost"], ["1", "lost"]]


def test_a_run_of_a_sweep_that_was_removed_is_no_other_run(
    terminal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another one's name begins as its own did."""
    other = make(tmp_path / "runs", "cells-30", job(), loss=0.5)
    for number in (1, 2):
        make(tmp_path / "runs", f"cells-{number}", job())
    folder = sweep(tmp_path / "runs", runs=[str(tmp_path / f"runs/cells-{number}") for number in (1, 2, 3)])
    assert terminal(str(folder))[3].split() == ["1", "unknown", "-", "cells-3"]
    monkeypatch.setattr(control, "_cancel", lambda run: pytest.fail(f"{run} was cancelled"))
    other.exit.unlink()
    control.cancel("cells-sweep")


def test_all_runs_of_a_sweep_are_cancelled_though_one_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make(tmp_path, f"cells-{number}", job()) for number in (1, 2, 3)]
    folder = sweep(tmp_path)
    left, problems = {run: JobStatus(Phase.RUNNING) for run in runs}, {"cells-2": "cannot be reached"}
    cancelled = []

    def cancel(run: RunFolder) -> None:
        if run.name == "cells-3":  # it ended meanwhile
            left[run] = JobStatus(Phase.DONE)
        if run.name in ("cells-3", *problems):
            raise JobError("RUN", run.name, problems.get(run.name, "is not running"), "Try it later")
        cancelled.append(run.name)
        left[run] = JobStatus(Phase.CANCELLED)

    monkeypatch.setattr(control, "_cancel", cancel)
    monkeypatch.setattr(control, "status_of", lambda run: ({}, lambda: left[run]))
    with pytest.raises(JobError, match="'cells-2': cannot be reached"):
        control.cancel(str(folder))
    assert cancelled == ["cells-1"]
    left[runs[2]] = JobStatus(Phase.RUNNING)
    problems.clear()
    control.cancel(str(folder))  # says nothing of the one that ended meanwhile
    assert cancelled == ["cells-1", "cells-2"]


def test_a_job_that_cannot_be_read_hides_nothing(terminal: Any, tmp_path: Path) -> None:
    broken = make(tmp_path / "runs", "cells-1", "name: [\n", loss=0.5)
    make(tmp_path / "runs", "cells-2", "- a list\n", loss=0.5)
    assert read_job(broken) == {} and len(terminal()) == 3
