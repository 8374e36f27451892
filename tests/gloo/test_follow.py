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
SESSION = """
import time, torch, muster
with muster.Session() as session:
    model = session.wrap(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session.track(model=model, optimizer=optimizer)
    for epoch in session.epochs(10):
        for (batch,) in session.batches(torch.utils.data.TensorDataset(torch.ones(16, 1)), 4):
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)
            time.sleep(0.03)
        print("the script says", epoch)
"""
BAR = re.compile("[━─]+  ")
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


def test_the_bar_is_seen(tmp_path: Path) -> None:
    keys = ("device=cpu", "parallel=single", "train.steps=100", "evaluation.every_steps=30", "log.every_steps=5")
    lines = watch(80, "jobs/digits.yaml", f"runs={tmp_path}", *keys)
    assert "training 100 steps (5 epochs): single, 1 rank on cpu" in lines
    drawn = [line for line in lines if BAR.match(line)]
    assert drawn and all(len(line.rstrip()) < 80 for line in drawn), lines
    assert any(re.search(r"  \d+/100  .*\d s left", line) for line in drawn)
    values = r"epoch \d(/5)?  train (loss )?\d\.\d{4}  eval (loss )?\d\.\d{4}"
    assert any(re.search(values, line) for line in drawn)
    evaluations = [line for line in lines if " evaluation loss " in line]
    assert [line.split("  ")[:2] for line in evaluations[:2]] == [
        ["step 23/100", "epoch 1"],
        ["step 30/100", "epoch 2"],
    ]
    assert lines.index(evaluations[-1]) > lines.index(drawn[0]), "they come above the bar, which is drawn again"
    assert "time " in lines[-3] or not [line for line in lines[lines.index(evaluations[-1]) + 2 :] if BAR.match(line)]


def test_a_session_has_the_bar_below_what_its_script_prints(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SESSION)
    (tmp_path / "train.yaml").write_text("script: train.py\ndevice: cpu\nlog: {every_steps: 1}\n")
    words = [str(tmp_path / "train.yaml"), f"script={tmp_path / 'train.py'}", f"runs={tmp_path}"]
    lines = watch(80, *words)
    assert "training 40 steps (10 epochs): single, 1 rank on cpu" in lines
    drawn = [line for line in lines if BAR.match(line)]
    assert any(re.search(r"  \d+/40  epoch \d+(/10)?  train (loss )?\d", line) for line in drawn), lines
    said = [line.rstrip() for line in lines if "says" in line]
    assert said == [f"the script says {epoch}" for epoch in range(10)], "and none on one line with a bar"


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
    assert any(BAR.match(line) for line in lines)
    assert len([line for line in lines if "step 40/40" in line]) == 1, "rank 0 says it"
    assert len([line for line in lines if line.startswith("mode ")]) == 1 and "done: " in lines[-2]


def test_a_script_has_no_bar_that_garbles_its_output(tmp_path: Path) -> None:
    (tmp_path / "say.py").write_text(SCRIPT)
    (tmp_path / "go").touch()
    keys = ("task=null", f"script={tmp_path / 'say.py'}", f"script_args=[{tmp_path / 'go'}]", f"runs={tmp_path}")
    lines = watch(80, str(SUPPORT / "faulty.yaml"), *keys)
    assert lines[1:4] == ["first of 0", "half of 0 and the rest", "error of 0"]
