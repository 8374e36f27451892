"""The bar of a run that is followed, and the lines above it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.launch.display import Bar, Lines
from trainer.run.log_tail import Tail

TRAINING = {
    "event": "training", "attempt": 0, "step": 0, "steps": 1800, "steps_per_epoch": 45, "parallel": "ddp",
    "world_size": 2, "device": "cpu",
}  # fmt: skip


def train(step: int, at: float, **values: float) -> dict[str, Any]:
    return {"kind": "train", "attempt": 0, "step": step, "time": at, "samples_per_s": 4882.0, **values}


@pytest.fixture
def bar(monkeypatch: pytest.MonkeyPatch) -> Bar:
    """In the middle of a training that makes 100 steps in a second."""
    monkeypatch.setenv("COLUMNS", "80")
    bar, now = Bar(is_script=False), time.time()
    bar.event(TRAINING)
    bar.metrics(train(400, now - 1, loss=0.5, mean_loss=0.5, lr=0.1))
    bar.metrics({"kind": "evaluation", "attempt": 0, "step": 405, "time": now, "loss": 0.168, "accuracy": 0.9583})
    bar.metrics(train(500, now, loss=0.5, mean_loss=0.0084, lr=0.1))
    return bar


def test_each_width_gets_what_matters_most(bar: Bar) -> None:
    shown = {columns: bar.line(columns) for columns in (12, 24, 40, 80, 120, 200)}
    assert all(len(line) <= columns - 3 for columns, line in shown.items()), shown
    for columns, line in shown.items():
        assert ("500/1800" in line, "s left" in line) == (columns > 12, columns > 24), line
    assert shown[80].endswith("  500/1800  epoch 12/40  train loss 0.0084  eval 0.1680  12 s left")
    assert "epoch 12/40  train loss 0.0084  eval loss 0.1680  accuracy 0.9583  4,882 samples/s  12 s left" in shown[200]
    lengths = [sum(map(shown[columns].count, "━─")) for columns in (40, 80, 200)]
    assert lengths[0] >= 4 and lengths[1] >= 10 and lengths[2] == 50
    assert shown[200].count("━") == 50 * 500 // 1800


def test_time_left_counts_down_between_two_lines(bar: Bar, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10)
    assert bar.line(80).endswith("  2 s left") or bar.line(80).endswith("  3 s left")
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    assert bar.line(80).endswith("  0 s left")


def test_lines_come_above_and_nothing_below_the_end(bar: Bar, capsys: pytest.CaptureFixture[str]) -> None:
    bar.draw()
    capsys.readouterr()
    bar.draw()
    assert capsys.readouterr().out == "", "nothing is new"
    bar.metrics({"kind": "evaluation", "attempt": 0, "step": 450, "loss": 0.1, "accuracy": 1.0})
    assert capsys.readouterr().out == "\r\x1b[Kstep 450/1800  epoch 10  evaluation loss 0.1000  accuracy 1.0000\n"
    bar.event({"event": "failure", "node": 0, "kind": "killed", "message": "x"})
    assert bar.line(80).endswith("restarting")
    bar.metrics(train(520, 0.0) | {"attempt": 1})
    assert bar.step == 450, "of an attempt that has not begun, or is over"
    bar.event({**TRAINING, "attempt": 1, "step": 448})
    assert "448/1800" in bar.line(80) and "restarting" not in bar.line(80)
    bar.draw()
    bar.event({"event": "stopped", "step": 449})
    assert capsys.readouterr().out.endswith("\r\x1b[Kstopped at step 449 with a checkpoint\n")
    bar.draw()
    bar.clear()
    assert capsys.readouterr().out == ""


def test_a_terminal_that_was_made_narrower_is_cleared(
    bar: Bar, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bar.draw()
    monkeypatch.setenv("COLUMNS", "20")
    bar.clear()
    assert capsys.readouterr().out.endswith("\r\x1b[K\x1b[A" * 3 + "\r\x1b[K")


def test_a_script_has_a_bar_once_its_session_trains(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    log = Tail(tmp_path / "log")
    bar = Bar(is_script=True)

    def says(text: str) -> bytes:
        (tmp_path / "log").open("a").write(text)
        bar.copy(log)
        bar.draw()
        return capfdbinary.readouterr().out

    assert says("loading\n") == b"loading\n"
    bar.event(TRAINING)
    assert says("half of").endswith(b"cpu\nhalf of"), "no bar in the middle of a line"
    assert says(" a line\n").startswith(b" a line\n\r") and b"0/1800" in bar.drawn.encode()
    assert says("next\n").startswith(b"\r\x1b[Knext\n\r")
    bar.say("above")
    assert capfdbinary.readouterr().out == b"\r\x1b[Kabove\n"
    assert says("no end") == b"no end"
    bar.say("on a line of its own")
    assert capfdbinary.readouterr().out == b"\non a line of its own\n"


def test_a_first_value_that_is_no_loss_has_its_name(bar: Bar) -> None:
    bar.metrics({"kind": "evaluation", "attempt": 0, "step": 450, "accuracy": 0.9})
    assert "train 0.0084  eval accuracy 0.9000" in bar.line(80)


def test_a_log_tells_training_and_evaluation_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.event(TRAINING)
    for step in (10, 20):
        lines.metrics(train(step, 0.0, loss=1.0, mean_loss=2.5, lr=0.1))
    lines.metrics({"kind": "evaluation", "step": 45, "loss": 0.5})
    lines.event({**TRAINING, "step": 46})
    lines.event({"event": "training", "parallel": "single", "world_size": 1, "device": "cpu", "steps": 7})
    assert capsys.readouterr().out.splitlines() == [
        "training 1800 steps (40 epochs): ddp, 2 ranks on cpu",
        "step 10/1800  epoch 1  train loss 2.5000  4,882 samples/s",
        "step 45/1800  epoch 1  evaluation loss 0.5000",
        "training from step 46 to 1800 (epoch 2 of 40): ddp, 2 ranks on cpu",
        "training 7 steps: single, 1 rank on cpu",
    ]


def test_a_terminal_without_these_characters_gets_others(bar: Bar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert bar.line(80).startswith("##") and bar.line(80).isascii()
