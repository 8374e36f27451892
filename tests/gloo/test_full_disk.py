"""A disk that is full, for real: what only observes goes on without it, and what ends says why."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from muster_runs import FULL, Run, result, submitted

from trainer.records import read_json, read_lines


def fill(disk: Path) -> Path:
    """A file that leaves no room for another byte."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                pass
    return ballast


def steps(run: Run) -> list[int]:
    return [line["step"] for line in read_lines(run.folder / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.parametrize("mode", [[], ["parallel=fsdp", "fsdp.min_params=1"]] if FULL else [[]])
def test_a_training_goes_on_while_nothing_can_be_written(
    tmp_path: Path, small_disk: Callable[[str], Path], mode: list[str]
) -> None:
    """Metrics, samples and events wait in memory, and are there in the end. Instead of a checkpoint there is the next
    one; the last is tried again until it is there.
    """
    disk = small_disk("8m")
    keys = ["train.steps=160", "train.batch_size=2", "task_args.step_s=0.03", "log.samples=true",
            "log.tensorboard=true", "checkpoint.every_steps=20"]  # fmt: skip
    with submitted(disk, *keys, *mode) as run:
        run.wait("checkpoint")
        ballast = fill(disk)
        before = len(steps(run))
        time.sleep(2)
        missing = 160 - len(steps(run))
        assert missing > 60 and before < 60, "or it was not full"
        ballast.unlink()
        assert run.wait("checkpoint", len(run.events("checkpoint")) + 1)["step"] < 160
        assert "Muster tries again with the next checkpoint" in run.events("notice")[-1]["message"]
        ballast = fill(disk)
        time.sleep(4)  # more than the steps that are left take
        ballast.unlink()
        assert result(run) == 0, run.log("node-0.log")
        assert not run.events("failure") and (run.folder / "checkpoints" / "step-000000160").is_dir()
        assert steps(run) == list(range(1, 161))
        for rank in range(2):
            lines = read_lines(run.folder / f"samples-rank{rank}.jsonl")
            assert [line["step"] for line in lines] == list(range(160))
        assert "bytes of this log could not be written" in run.log("rank-0.log")


def test_the_last_word_finds_room(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    """A checkpoint that finds no room ends the run: why is said by each that may be asked."""
    disk = small_disk("8m")
    with submitted(
        disk, "train.steps=100000", "task_args.step_s=0.02", "agent.restarts=1", "checkpoint.in_memory=false"
    ) as run:
        run.wait("checkpoint")
        fill(disk)
        assert result(run) == 1
        failure = read_json(run.folder / "failure.json")
        assert failure and {item["kind"] for item in failure["failures"]} == {"disk full"}, failure
        assert "[disk full]" in failure["reason"] and "Free space" in failure["reason"]
        status = run.status()
        assert (status["state"], status["code"]) == ("failed", 1)
        assert "[disk full]" in status["reason"]
        assert run.events("ended"), "the events are written last"
