"""What is seen in a terminal while a run is followed."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest
from muster_runs import MUSTER, environment, processes_of, wait_for

from trainer.records import read_json

ROOT = Path(__file__).parents[2]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def watch(columns: int, *words: str) -> list[str]:
    """The lines that `muster run` shows in a terminal of this width, each as often as it was drawn."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {k: v for k, v in environment(TERM="xterm").items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen([MUSTER, "run", *words], stdout=theirs, stderr=theirs, cwd=ROOT, env=variables)
    os.close(theirs)
    shown = b""
    while True:
        try:
            new = os.read(ours, 65536)
        except OSError:  # nobody has the terminal open any more
            break
        shown += new
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return re.split(r"[\r\n]+", CONTROL.sub("", shown.decode()))


@pytest.mark.parametrize("columns", [80, 140])
def test_the_bar_is_seen(tmp_path: Path, columns: int) -> None:
    keys = ("device=cpu", "parallel=single", "train.steps=100", "evaluation.every_steps=30")
    lines = watch(columns, "jobs/digits.yaml", f"runs={tmp_path}", *keys)
    drawn = [line for line in lines if "samples/s" in line and "/100" in line]
    assert drawn, lines
    for line in drawn:
        assert len(line.rstrip()) <= columns
        assert line.count("━") + line.count("╸") + line.count("╺") >= 10, line
        assert re.search(r"loss \d\.\d{4}  [\d,]+ samples/s", line), line
    assert any("accuracy" in line for line in drawn) == (columns == 140)


def test_a_terminal_that_is_closed_ends_the_run(tmp_path: Path) -> None:
    """The kernel sends SIGHUP to the command: the ranks save, and nothing is left running."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(ROOT)
        words = ["muster", "run", "jobs/digits.yaml", "device=cpu", f"runs={tmp_path}", "train.epochs=1000"]
        os.execve(MUSTER, words, environment(TERM="xterm"))
    shown = b""
    while b"samples/s" not in shown:
        shown += os.read(terminal, 65536)
    os.close(terminal)
    os.waitpid(process, 0)
    wait_for("end of all its processes", lambda: not processes_of(str(tmp_path)), 20)
    (run,) = tmp_path.glob("digits-*")
    ended = read_json(run / "exit.json")
    assert ended and ended["code"] == 75 and [*run.glob("checkpoints/step-*")]
