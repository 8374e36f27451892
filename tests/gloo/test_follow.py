"""What is seen while a run is followed: the bar of a task, the output of a script."""

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
from muster_runs import MUSTER, environment, followed, muster, processes_of, wait_for
from paths import ROOT, SUPPORT

from trainer.records import read_json

SCRIPT = """
import os, pathlib, sys, time
rank = int(os.environ["RANK"])
print("first of", rank)
print("half of", rank, end="", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.02)
print(" and the rest")
print("error of", rank, file=sys.stderr)
sys.stdout.write("no end of line")
"""
"""Waits in the middle of a line for a file."""
TASK = """
import os
from trainer.tasks.digits import Digits

class Talking(Digits):
    def model(self):
        print(os.environ["RANK"], "makes a model")
        return super().model()
"""
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


def test_the_output_of_a_script_is_seen_as_it_comes(tmp_path: Path) -> None:
    """Of rank 0, and half lines too, as under torchrun."""
    (tmp_path / "say.py").write_text(SCRIPT)
    words = ["task=null", f"script={tmp_path / 'say.py'}", f"script_args=[{tmp_path / 'go'}]", f"runs={tmp_path}"]
    with followed(tmp_path, SUPPORT / "faulty.yaml", *words) as (run, process):
        assert process.stdout is not None
        shown = b""
        while b"half of 0" not in shown:
            shown += os.read(process.stdout.fileno(), 4096)
        assert b"rest" not in shown
        (tmp_path / "go").touch()
        shown += process.stdout.read().encode()
        assert process.wait() == 0
        begin = "first of 0\nhalf of 0 and the rest\nerror of 0\nno end of line"
        assert shown.decode().startswith(begin), shown
        assert run.log("rank-1.log").startswith("first of 1")


def test_the_output_of_all_ranks_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "say.py").write_text(SCRIPT)
    (tmp_path / "go").touch()
    script = f"script: {tmp_path / 'say.py'}\nscript_args: [{tmp_path / 'go'}]\ndevices_per_node: 2\ndevice: cpu\n"
    (tmp_path / "say.yaml").write_text(script)
    done = muster("run", tmp_path / "say.yaml", f"runs={tmp_path}", "--all-ranks")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = ["first of {}", "half of {} and the rest", "error of {}", "no end of line"]
    assert [line for line in lines if line in [text.format(0) for text in said]] == [text.format(0) for text in said]
    assert [line for line in lines if line.startswith("[rank ")] == [f"[rank 1] {text.format(1)}" for text in said]


def test_all_ranks_of_a_task_speak_above_the_bar(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(TASK)
    (tmp_path / "talk.yaml").write_text("task: talk:Talking\ndevice: cpu\ndevices_per_node: 2\n")
    lines = watch(100, str(tmp_path / "talk.yaml"), f"runs={tmp_path}", "train.steps=40", "--all-ranks")
    assert {line.rstrip() for line in lines if "makes" in line} == {"0 makes a model", "[rank 1] 1 makes a model"}
    assert any(line.count("━") > 5 for line in lines)


def test_a_script_has_no_bar_that_garbles_its_output(tmp_path: Path) -> None:
    (tmp_path / "say.py").write_text(SCRIPT)
    (tmp_path / "go").touch()
    keys = ("task=null", f"script={tmp_path / 'say.py'}", f"script_args=[{tmp_path / 'go'}]", f"runs={tmp_path}")
    lines = watch(80, str(SUPPORT / "faulty.yaml"), *keys)
    assert lines[1:4] == ["first of 0", "half of 0 and the rest", "error of 0"]
