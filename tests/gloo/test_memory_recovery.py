"""Ranks are killed: the next attempt goes on from a copy in the memory of an agent, and repeats a few steps at most."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from muster_runs import FULL, HERE, Run, alive, kill, result, submitted, wait_for
from ranks import complete, make_job, order_of_samples, train
from states import difference, read_state

from trainer.checkpoint.memory import Memory
from trainer.records import read_lines
from trainer.run.folder import RunFolder

ONE_NODE, TWO_NODES = ["devices_per_node=2"], ["nodes=2"]
ALONE = ["devices_per_node=1"]
RARELY = ["checkpoint.every_steps=1000000", "train.steps=1000000"]
"""Whoever goes on has not read a checkpoint."""
REPEATED_S = 1.0
"""What a failure costs at most in steps that are done again: 100 times a copy of the state, on a busy machine."""
STEP_S = 0.004
KILLS = 12 if FULL else 4
TOPOLOGIES = [ONE_NODE, TWO_NODES, ["nodes=2", "devices_per_node=2"], ALONE]
KINDS = [
    [],
    ["task_args.buffers=true", "train.ema_decay=0.9", "train.accumulate=2"],
    ["task_args.noise=true", "train.schedule=cosine", "data.workers=1"],
]
TRIED = [(ONE_NODE, KINDS[1]), (TWO_NODES, KINDS[2]), (TOPOLOGIES[2], KINDS[0]), (ALONE, KINDS[1])]


def kill_at_any_moment(run: Run, chance: random.Random, ranks: list[int]) -> dict[str, float]:
    """Kill ranks while the training goes on; return the resume that follows, with the steps that were lost."""
    count = len(run.events("first_step"))
    time.sleep(chance.uniform(0.05, 0.3))
    for process in [run.ranks()[rank] for rank in ranks]:
        kill(process)
    run.wait("first_step", count + 1)
    resume = run.events("resume")[-1] if run.events("resume") else {"step": 0, "folder": None, "attempt": None}
    done = [
        line["step"] for line in read_lines(run.folder / "metrics.jsonl") if line["attempt"] == resume["attempt"] - 1
    ]
    return {**resume, "lost": max(done) - resume["step"]}


@pytest.mark.parametrize("topology, kind", list(itertools.product(TOPOLOGIES, KINDS)) if FULL else TRIED)
def test_the_training_is_the_same(tmp_path: Path, topology: list[str], kind: list[str]) -> None:
    """Weights bit by bit, and every sample once; also where ranks differ in buffers and in any generator."""
    keys = [*topology, *kind, f"train.steps={KILLS * 50 + 50}", "evaluation.every_steps=12", "log.samples=true",
            "checkpoint.best=loss", "checkpoint.best_mode=min", "agent.restarts=3"]  # fmt: skip
    expected = complete(tmp_path / "calm", make_job(*keys, file=HERE / "faulty.yaml")).folder
    chance = random.Random(str(keys))
    with submitted(tmp_path / "killed", *keys, f"task_args.step_s={STEP_S}") as run:
        run.wait("first_step")
        ranks = len(run.ranks())
        victims = [[chance.randrange(ranks)] if number % 2 else list(range(ranks)) for number in range(KILLS)]
        resumes = [kill_at_any_moment(run, chance, each) for each in victims]
        assert result(run, 120) == 0, run.log("node-0.log")
    assert difference(read_state(expected), read_state(run.folder)) == ""
    assert order_of_samples(run.folder) == order_of_samples(expected)
    assert [resume["folder"] for resume in resumes] == ["memory"] * KILLS
    assert max(resume["lost"] for resume in resumes) * STEP_S <= REPEATED_S, resumes


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    keys = [*ONE_NODE, f"task_args.step_s={STEP_S}", "train.steps=1000000", "checkpoint.in_memory=false"]
    with submitted(tmp_path, *keys) as run:
        run.wait("checkpoint", 3)
        assert kill_at_any_moment(run, random.Random(0), [1])["folder"].startswith("step-")


def test_progress_in_memory_is_progress(tmp_path: Path) -> None:
    """Without a checkpoint in between: more failures than restarts that may be used without progress."""
    with submitted(tmp_path, *ONE_NODE, *RARELY, f"task_args.step_s={STEP_S}", "agent.restarts=1") as run:
        run.wait("first_step")
        steps = [kill_at_any_moment(run, random.Random(n), [n % 2])["step"] for n in range(4)]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize("order", ["raise", "exit 3", "memory"])
def test_a_rank_that_fails_by_itself(tmp_path: Path, order: str) -> None:
    with submitted(tmp_path, *TWO_NODES, *RARELY, f"task_args.step_s={STEP_S}") as run:
        run.wait("first_step")
        run.order(1, order)
        resume = run.wait("resume")
        assert resume["folder"] == "memory" and resume["step"] > 0


def test_a_hung_rank(tmp_path: Path) -> None:
    keys = [*ONE_NODE, *RARELY, f"task_args.step_s={STEP_S}", "agent.hang_timeout_s=3"]
    with submitted(tmp_path, *keys) as run:
        run.wait("first_step")
        run.order(1, "hang")
        resume = run.wait("resume")
        assert resume["folder"] == "memory" and resume["step"] > 0


def test_what_memory_alone_holds_in_the_end_is_saved(tmp_path: Path) -> None:
    """The last checkpoint could not be, and a rank was killed: the next one finds nothing else to do."""
    memory, job = Memory.make(), make_job("train.steps=4", "devices_per_node=1", file=HERE / "faulty.yaml")
    for attempt in range(2):
        memory.attempt = attempt
        run = train(tmp_path, job, **memory.environment())
        assert run.codes == [0], run.output()
        last = tmp_path / "checkpoints" / "step-000000004"
        assert last.is_dir(), f"of attempt {attempt}"
        shutil.rmtree(last.parent)
    assert [event["folder"] for event in RunFolder(tmp_path).read_events() if event["event"] == "resume"] == ["memory"]


def buffers(run: Run) -> list[str]:
    """The memory of the only agent."""
    files = Path("/proc", str(run.agents()[0]), "fd").iterdir()
    return [str(path) for path in files if re.search("muster-[0-9]", os.readlink(path))]


def test_memory_that_changed_is_refused(tmp_path: Path) -> None:
    """A flipped bit in both copies between two attempts: the checkpoint on disk is taken."""
    with submitted(tmp_path, *ONE_NODE, "task_args.step_s=0.01", "train.steps=1000000") as run:
        run.wait("checkpoint", 3)
        os.kill(run.template(0), signal.SIGSTOP)  # no rank is started meanwhile
        kill(run.ranks()[0])
        kill(run.ranks()[1])
        wait_for("the end of the ranks", lambda: not any(alive(pid) for pid in run.ranks().values()))
        for path in buffers(run):
            data = bytearray(Path(path).read_bytes())
            data[data.rindex(b"position")] ^= 1
            with open(path, "r+b") as file:
                file.write(data)
        os.kill(run.template(0), signal.SIGCONT)
        assert run.wait("resume")["folder"].startswith("step-")
