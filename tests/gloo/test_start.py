"""Until the first step is done: who prepares the data, how long that may take, and what its failure is called."""

from __future__ import annotations

from pathlib import Path

from muster_runs import followed, result, submitted

TASK = """
import os, time
from pathlib import Path
from trainer.tasks.digits import Digits
from trainer.task import Task

FILE = Path(__file__).with_name("data.bin")
RANK = int(os.environ["RANK"])

class Slow(Digits):
    prepare = Task.prepare  # it says nothing of who prepares
    steps = 0

    def train_dataset(self):
        if not FILE.exists():
            with FILE.open("wb") as file:
                for _ in range(8):
                    file.write(bytes(1000))
                    file.flush()
                    time.sleep(0.5)
        if FILE.stat().st_size != 8000:
            raise EOFError("half a file")
        return super().train_dataset()

    def loss(self, output, batch):
        self.steps += 1
        if self.steps == 1 and RANK == 1:
            time.sleep(4)  # as if it compiled
        return super().loss(output, batch)

class Broken(Digits):
    def prepare(self):
        print("preparing", RANK, flush=True)
        raise ValueError("no such archive")
"""
JOB = "device: cpu\ndevices_per_node: 2\ntrain: {batch_size: 64, steps: 30}\nlog: {tensorboard: false}\n"


def test_what_comes_before_the_second_step_has_the_time_of_the_start(tmp_path: Path) -> None:
    """A file that the first rank takes 4 s to make and no other rank reads half made, and a slow first step."""
    (tmp_path / "slow.py").write_text(TASK)
    (tmp_path / "slow.yaml").write_text(f"task: slow:Slow\n{JOB}")
    with submitted(tmp_path, "agent.hang_timeout_s=2", "agent.restarts=0", file=tmp_path / "slow.yaml") as run:
        assert result(run) == 0, run.status()["reason"]
        assert not run.events("failure")


def test_a_failure_that_is_sure_to_repeat_is_tried_twice_and_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(TASK)
    (tmp_path / "broken.yaml").write_text(f"task: broken:Broken\n{JOB}")
    with followed(tmp_path, tmp_path / "broken.yaml", f"runs={tmp_path / 'runs'}") as (run, process):
        assert process.stdout is not None
        shown = process.stdout.read()
        assert process.wait() == 1
        assert "ValueError: no such archive (at broken.py:34)" in shown
        assert "failed twice in the same way, before the first step was done" in shown
        assert "restarts 1: ValueError at broken.py:34 (1x)" in shown
        assert [len(run.events(name)) for name in ("failure", "restart")] == [2, 1]
        printed = run.log("rank-0.log") + run.log("rank-1.log")
        assert printed.count("preparing 0") == 2 and "preparing 1" not in printed
