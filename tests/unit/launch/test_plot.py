"""`muster plot`: each step of a run once, runs side by side, and the same in TensorBoard."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import JobError
from trainer.launch import plot
from trainer.run.folder import RunFolder


def make(root: Path, name: str, lines: list[dict[str, Any]], lr: float = 0.1) -> RunFolder:
    run = RunFolder(root / name)
    run.events.mkdir(parents=True)
    run.job.write_text(f"name: cells\ntrain: {{lr: {lr}}}\n")
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def train(step: int, attempt: int | None = 0, loss: float = 1.0) -> dict[str, Any]:
    line = {"kind": "train", "step": step, "loss": 9.0, "mean_loss": loss, "lr": 0.1, "samples_per_s": 5.0, "time": 1.0}
    return line if attempt is None else {**line, "attempt": attempt}


def evaluation(step: int, attempt: int, accuracy: float = 0.5) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "attempt": attempt, "loss": 2.0, "accuracy": accuracy}


def steps(curves: plot.Curves, name: str, kind: str = "train") -> list[int]:
    return [step for step, _ in curves[name, kind].points]


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    lines = [*map(train, (10, 20, 30, 40)), evaluation(45, 0, 0.1), train(50), train(22, 1, 3.0), train(60, 0)]
    curves = plot.read_curves(make(tmp_path, "cells-1", [*lines, train(32, 1), {"step": "x"}, train(61)]).metrics)
    assert steps(curves, "loss") == [10, 20, 22, 32], "the killed attempt's last line came late"
    assert curves["loss", "train"].points[2] == (22, 3.0)
    assert set(curves) == {("loss", "train")}, "the evaluation at step 45 was never reached again"
    same = [train(10), train(20, loss=9.0), train(20, 1), train(30, 1)]
    again = plot.read_curves(make(tmp_path, "cells-2", same).metrics)
    assert steps(again, "loss") == [10, 20, 30], "the killed attempt had come no further than its successor begins"
    lines = [train(step, None) for step in (10, 20, 30, 20, 40)]
    assert steps(plot.read_curves(make(tmp_path, "old-1", lines).metrics), "loss") == [10, 20, 40]


def test_a_long_run_is_thinned_out_and_not_cut(tmp_path: Path) -> None:
    curves = plot.read_curves(make(tmp_path, "cells-1", [train(step) for step in range(30_000)]).metrics)
    kept = steps(curves, "loss")
    assert plot.MOST <= len(kept) <= 2 * plot.MOST and kept[0] < 50 and kept[-1] > 29_950
    assert len({b - a for a, b in pairwise(kept)}) == 1


def test_values_of_scripts_have_the_names_they_were_given(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": 1, "attempt": 0, "generator": 1.0, "discriminator": 2.0, "samples_per_s": 3.0}]
    assert set(plot.read_curves(make(tmp_path, "gan-1", lines).metrics)) == {
        ("generator", "train"), ("discriminator", "train"),
    }  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, lr in ((1, 0.1), (2, 0.01)):
        make(tmp_path / "runs", f"cells-{number}", [train(1), train(2), evaluation(2, 0)], lr)
    sweep = tmp_path / "runs/cells-sweep-3"
    (sweep / "events").mkdir(parents=True)
    runs = [str(tmp_path / f"runs/cells-{number}") for number in (1, 2)]
    (sweep / "sweep.json").write_text(json.dumps({"sweep": "train.lr=0.1,0.01", "runs": runs}))
    return tmp_path


def test_without_matplotlib_tensorboard_shows_these_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.plot(["cells-s"], None) == 0
    said = capsys.readouterr()
    runs = project / "runs"
    spec = f"lr=0.1:{runs / 'cells-1/tensorboard'},lr=0.01:{runs / 'cells-2/tensorboard'}"
    assert said.out == f"tensorboard --logdir_spec={spec}\n" and 'pip install "muster-train[plot]"' in said.err
    assert plot.plot(["cells-1", "runs/cells-1"], Path("x.png")) == 1, "there is no picture"
    assert capsys.readouterr().out == f"tensorboard --logdir {runs / 'cells-1/tensorboard'}\n"


def test_runs_are_drawn_into_one_picture(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure  # without, see above
    assert plot.plot(["cells-s", "cells-1"], None) == 0
    assert capsys.readouterr().out == "plot.png\n" and Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert plot.plot(["cells-2"], Path("two.svg")) == 0
    runs = plot.runs_of("cells-s")
    drawn = plot.draw(figure, runs, plot.labels(runs))
    loss, accuracy = drawn.axes
    assert (loss.get_title(), len(loss.lines), accuracy.get_title(), len(accuracy.lines)) == ("loss", 4, "accuracy", 2)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["lr=0.1", "lr=0.01"]
    for name in ("plot.nothing", "nowhere/plot.png"):
        with pytest.raises(JobError, match=r"--output=.*cannot be written"):
            plot.plot(["cells-1"], Path(name))


def test_a_run_without_metrics_is_refused(project: Path) -> None:
    make(project / "runs", "empty-1", [])
    with pytest.raises(JobError, match=r"has no metrics here\. Wait for the first"):
        plot.read_curves(project / "runs/empty-1/metrics.jsonl")
    with pytest.raises(JobError, match="is not a run folder"):
        plot.runs_of("nothing")
